"""The two names torchscale imports; using them means the test asked for something it should not."""


def checkpoint_wrapper(module, **kwargs):
    """Activation checkpointing is never on in the comparisons."""
    raise NotImplementedError("fairscale is a stub here: leave checkpoint_activations off")


def wrap(module, **kwargs):
    """Sharding is never on in the comparisons."""
    raise NotImplementedError("fairscale is a stub here: leave fsdp off")
