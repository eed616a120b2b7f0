"""Files of weights that mean harm or are broken, written byte by byte."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

NAMES = (
    "posix.system", "os.system", "os.popen", "os.execv", "subprocess.Popen", "subprocess.check_output", "pty.spawn",
    "builtins.eval", "builtins.exec", "builtins.compile", "builtins.__import__", "builtins.getattr", "builtins.open",
    "__builtin__.eval", "importlib.import_module", "runpy._run_code", "runpy.run_path", "timeit.timeit", "cProfile.run",
    "pdb.run", "doctest.debug_script", "code.InteractiveInterpreter", "types.FunctionType", "types.CodeType",
    "ctypes.CDLL", "shutil.rmtree", "socket.socket", "urllib.request.urlopen", "http.client.HTTPSConnection",
    "webbrowser.open", "operator.methodcaller", "operator.attrgetter", "functools.partial", "functools.reduce",
    "asyncio.unix_events._UnixSubprocessTransport._start", "pip.main", "ensurepip._run_pip", "idlelib.run.Executive",
    "pydoc.pipepager", "lib2to3.pgen2.grammar.Grammar.loads", "logging.config.listen", "distutils.file_util.write_file",
    "pickle.loads", "marshal.loads", "copyreg._reconstructor", "collections.Counter.update", "argparse.FileType",
    "numpy.load", "numpy.core.multiarray._reconstruct", "numpy.testing._private.utils.runstring",
    "numpy.f2py.crackfortran.getlincoef", "torch.load", "torch.hub.load", "torch.jit.load",
    "torch.utils.cpp_extension.load", "torch.utils.collect_env.run", "torch.utils._config_module.load_config",
    "torch._inductor.codecache.PyCodeCache.load", "torch._utils._rebuild_sparse_tensor",
    "torch._utils._rebuild_qtensor", "torch._tensor._rebuild_from_type_v2", "torch.nn.modules.linear.Linear",
    "yacs.config.eval", "transformers.AutoModel.from_pretrained",
)  # fmt: skip
"""Functions and classes that a pickle may name to do something: one at least of every way around scanners."""


def text(value: str) -> bytes:
    """The instruction for a text."""
    return b"X" + struct.pack("<L", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    """The instruction for a whole number of any size."""
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<l", value)
    content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content


def numbers(values: tuple[int, ...]) -> bytes:
    """The instructions for a tuple of numbers."""
    return b"(" + b"".join(map(number, values)) + b"t"


def name(path: str) -> bytes:
    """The instruction for a function or class."""
    module, _, own = path.rpartition(".")
    return f"c{module}\n{own}\n".encode()


def call(path: str, given: bytes) -> bytes:
    """The instructions for a call; ``given`` makes one argument."""
    return name(path) + given + b"\x85R"


def tensor(
    shape: tuple[int, ...] = (2,),
    stride: tuple[int, ...] = (1,),
    offset: int = 0,
    size: int = 2,
    key: str = "0",
    kind: str = "FloatStorage",
) -> bytes:
    """The instructions for a tensor, of two floats unless told otherwise."""
    storage = b"(" + text("storage") + name(f"torch.{kind}") + text(key) + text("cpu") + number(size) + b"tQ"
    rest = number(offset) + numbers(shape) + numbers(stride) + b"\x89" + name("collections.OrderedDict") + b")R"
    return name("torch._utils._rebuild_tensor_v2") + b"(" + storage + rest + b"tR"


def state(**entries: bytes) -> bytes:
    """A pickled dict."""
    return b"\x80\x02}(" + b"".join(text(key) + value for key, value in entries.items()) + b"u."


def records(data: bytes, **more: bytes) -> dict[str, bytes]:
    """What lies in an archive of `torch.save`, with two floats as storage 0."""
    return {"x/data.pkl": data, "x/data/0": struct.pack("<2f", 1, 2), "x/version": b"3\n", **more}


def archive(content: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as made:
        for key, value in content.items():
            made.writestr(key, value)
    return file.getvalue()


def saved(data: bytes, **more: bytes) -> bytes:
    """An archive as of `torch.save` with this pickle."""
    return archive(records(data, **more))


def module(cls: str = "Model", **attributes: bytes) -> bytes:
    """The instructions for a module of TorchScript."""
    filled = b"}(" + b"".join(text(key) + value for key, value in attributes.items()) + b"u"
    return name(f"__torch__.{cls}") + b")\x81" + filled + b"b"


def scripted(made: bytes, **more: bytes) -> bytes:
    """An archive as of `torch.jit.save` with a module that is made so."""
    return saved(b"\x80\x02" + made + b".", **{"x/code/__torch__.py": b"import os", "x/constants.pkl": b"", **more})


def code(command: str) -> Iterator[tuple[str, bytes, str]]:
    """Files that would run ``command`` if they were loaded as pickles: (kind, content, what the refusal says)."""
    shell, run = text(command), name("posix.system")
    for path in NAMES:
        yield path, saved(state(weight=call(path, shell))), f"contains code: {path}"
    plain = state(weight=tensor())
    bodies = {
        "instance": (b"(" + shell + b"iposix\nsystem\n.", "contains code: posix.system"),
        "object": (b"(" + run + shell + b"o.", "contains code: posix.system"),
        "stack_global": (b"\x80\x04" + text("posix") + text("system") + b"\x93" + shell + b"\x85R.", "posix.system"),
        "new_object": (run + shell + b"\x85\x81.", "contains code: posix.system"),
        "new_object_ex": (run + shell + b"\x85}\x92.", "contains code: posix.system"),
        "from_memo": (run + b"q\x000h\x00" + shell + b"\x85R.", "contains code: posix.system"),
        "extension_1": (b"\x82\x01" + shell + b"\x85R.", "instruction EXT1"),
        "extension_4": (b"\x84\x01\0\0\0" + shell + b"\x85R.", "instruction EXT4"),
        "persistent": (b"Pposix.system\n.", "instruction PERSID"),
        "behind_the_end": (plain + b"\x80\x02" + call("posix.system", shell) + b".", "goes on behind its end"),
        "in_a_storage": (plain.replace(name("torch.FloatStorage"), run), "contains code: posix.system"),
        "in_a_key": (b"\x80\x02}(" + call("posix.system", shell) + b"Nu.", "contains code: posix.system"),
        "nested": (b"\x80\x02" + call("posix.system", call("posix.system", shell)) + b".", "contains code"),
        "as_attributes": (name("argparse.Namespace") + b")\x81" + call("posix.system", shell) + b"b.", "posix.system"),
        "with_escapes": (name("os\x1b[2J.system") + shell + b"\x85R.", r"contains code: 'os\\x1b\[2J.system'"),
    }
    for kind, (body, why) in bodies.items():
        yield kind, saved(body), why
    bare = b"\x80\x02" + call("posix.system", shell) + b"."
    yield "second_pickle", saved(plain, **{"x/other/data.pkl": bare}), "other/data.pkl: it is not what torch.save"
    yield "second_root", saved(plain, **{"y/data.pkl": bare}), "y/data.pkl: it is not what torch.save"
    yield "script", saved(plain, **{"x/code/model.py": b"import os"}), r"contains code: x/code/model.py \(TorchScript\)"
    yield "script_values", saved(plain, **{"x/constants.pkl": bare}), r"constants.pkl \(TorchScript\)"
    yield "bare_pickle", bare, "bare pickle"
    yield "bare_pickle_4", b"\x80\x04" + bare[2:], "bare pickle"
    yield "bare_pickle_0", f"cposix\nsystem\n(V{command}\ntR.".encode(), "no file of weights"
    yield "tar", tar({"sys_info": bare, "pickle": bare, "storages": b"", "tensors": b""}), "is a tar"
    within = scripted(module(weight=tensor(), hook=call("posix.system", shell)))
    yield "in_a_module", within, "contains code: posix.system"
    yield "module_of_its_own", scripted(module(part=module(weight=call("os.execv", shell)))), "contains code: os.execv"
    yield "module_without_code", saved(b"\x80\x02" + module(weight=tensor()) + b"."), "contains code: __torch__.Model"
    yield "almost_a_module", scripted(name("__torch__x.system") + b")\x81."), "contains code: __torch__x.system"
    yield "almost_a_list", scripted(name("torch.jit._pickle.eval") + shell + b"\x85R."), "torch.jit._pickle.eval"
    yield "unpickler", scripted(name("torch.jit._pickle.Unpickler")), "contains code: torch.jit._pickle.Unpickler"
    objects = io.BytesIO()
    np.save(objects, np.array([{}], dtype=object), allow_pickle=True)
    yield "objects", archive({"a.npy": objects.getvalue()[:-10] + bare}), "a.npy is of object"
    yield (
        "array_header",
        archive({"a.npy": array(b"__import__('os').system('" + command.encode() + b"')")}),
        "damaged header",
    )


def tar(content: dict[str, bytes]) -> bytes:
    """A tar."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as made:
        for key, value in content.items():
            info = tarfile.TarInfo(key)
            info.size = len(value)
            made.addfile(info, io.BytesIO(value))
    return file.getvalue()


def array(header: bytes, data: bytes = b"") -> bytes:
    """An .npy with any header."""
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def described(shape: str, kind: str = "<f4", data: bytes = bytes(8)) -> bytes:
    """An .npz with one array that is described so."""
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}}}".encode()
    return archive({"a.npy": array(header, data)})


def tensors(header: dict, data: bytes = bytes(8), length: int | None = None) -> bytes:
    """A safetensors file with any header."""
    content = json.dumps(header).encode()
    return struct.pack("<Q", len(content) if length is None else length) + content + data


def bombs() -> Iterator[tuple[str, Callable[[], bytes], str]]:
    """Small files that would take much memory or time: (kind, maker of the content, what the refusal says)."""
    plain = state(weight=tensor())
    zeros = records(plain, **{"x/data/1": bytes(64 * 2**20)})
    shared = b"".join(b"U\x04" + b"%04d" % i + b"h\x01" for i in range(2000))
    yield "deflated", lambda: archive(zeros, zipfile.ZIP_DEFLATED), "is compressed or encrypted"
    yield "deflated_arrays", lambda: archive({"a.npy": bytes(2**26)}, zipfile.ZIP_DEFLATED), "is compressed"
    yield "records", lambda: archive({f"x/data/{i}": b"" for i in range(100_001)}), "more than the 100000 allowed"
    yield "records_told", lambda: many(saved(plain)), "more than the 100000 allowed"
    yield "long_pickle", lambda: saved(plain[:-1] + b"0" * 2**23 + b"."), "expected at most 8388608"
    yield "nested_lists", lambda: saved(b"\x80\x02" + b"]" * 10**6 + b"a" * (10**6 - 1) + b"."), "holds no weights"
    yield "nested_tuples", lambda: saved(b"\x80\x02)" + b"\x85" * 10**6 + b"."), "holds no weights"
    yield "nested_keys", lambda: saved(b"\x80\x02})" + b"\x85" * 10**6 + b"Ns."), "neither text nor a small number"
    yield "huge_shape", lambda: saved(state(w=tensor((2**30,), (1,), 0, 2**30))), "has 8 bytes, expected 1073741824"
    yield "huge_size", lambda: saved(state(w=tensor((2**40,), (1,)))), "not within its storage of 2"
    yield "expanded", lambda: saved(state(w=tensor((2**20, 2**20), (0, 0)))), "not within its storage of 2"
    yield "many_views", lambda: saved(state(**{f"w{i}": tensor((2**12 - i,), (1,), i, 2**12) for i in range(2000)}),
                                      **{"x/data/0": bytes(2**14)}), "more than 2 times the file"  # fmt: skip
    yield (
        "colliding_keys",
        lambda: saved(b"\x80\x02}(" + b"".join(number((2**61 - 1) * i) + b"N" for i in range(1, 10**5)) + b"u."),
        "neither text nor a small number",
    )
    yield "dimensions", lambda: saved(state(w=tensor((1,) * 10**5, (1,) * 10**5))), "not strided numbers"
    yield "long_number", lambda: saved(b"\x80\x02\x8b" + struct.pack("<L", 2**20) + b"\x7f" * 2**20 + b"."), "LONG4"
    yield "digits", lambda: saved(b"\x80\x02I" + b"9" * 2**20 + b"\n."), "damaged before byte"
    yield "shared_names", lambda: saved(b"\x80\x02" + tensor() + b"q\x010}(" + shared + b"u."), "POP"
    numerous = b"".join(text(f"w{i}") + b"h\x01" for i in range(100_001))
    shared_modules = module()  # 2 ** 30 of them, by two attributes of each
    for _ in range(30):
        inner = shared_modules + b"q\x01"
        shared_modules = name("__torch__.M") + b")\x81}(" + text("a") + inner + text("b") + b"h\x01ub"
    nested = b"".join(name("__torch__.M") + b")\x81}" + text("a") for _ in range(20_000))
    yield "modules_shared", lambda: scripted(shared_modules), "more than 100000 attributes"
    yield "module_in_itself", lambda: scripted(name("__torch__.M") + b")\x81q\x00}" + text("a") + b"h\x00sb"), "deeper"
    yield "modules_nested", lambda: scripted(nested + b"N" + b"sb" * 20_000), "nested deeper than 64"
    yield (
        "module_attributes",
        lambda: scripted(name("__torch__.M") + b")\x81}(" + text("w") + tensor() + b"q\x01" + numerous + b"ub"),
        "more than 100000 attributes",
    )
    yield "module_name", lambda: scripted(module(**{"w" * 2**20: tensor()})), "no name of one"
    yield "array_shape", lambda: described("(1099511627776,)"), "its data are 8 bytes"
    yield "array_dimensions", lambda: described(f"({'1,' * 70})", data=bytes(4)), "its data are 4 bytes"
    yield "array_header", lambda: archive({"a.npy": array(b"(" * 60_000)}), "a header of 60000 bytes"
    yield "array_nested", lambda: archive({"a.npy": array(b"(" * 9_000)}), "damaged header"
    yield "header", lambda: tensors({}, length=2**62), "is damaged"
    yield "tensor", lambda: tensors({"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}), "is damaged"


def many(content: bytes) -> bytes:
    """A zip whose end tells of a million records."""
    end = bytearray(content)
    end[-14:-10] = struct.pack("<2H", 0xFFFF, 0xFFFF)
    end[-10:-6] = struct.pack("<L", 2**31)
    return bytes(end)


def broken() -> Iterator[tuple[str, bytes, str]]:
    """Files that are not what they should be: (kind, content, what the refusal says)."""
    plain = saved(state(weight=tensor()))
    directory = plain.index(b"PK\1\2")
    yield "empty", b"", "no file of weights"
    yield "html", b"<html>no such file</html>", "no file of weights"
    yield "gzip", b"\x1f\x8b" + bytes(30), "compressed by gzip"
    yield "hdf5", b"\x89HDF\r\n" + bytes(600), "is HDF5"
    yield "array", array(b"{}"), "a single array"
    yield "zip_start", plain[:40], "cut short"
    yield "appended", plain + b"\0", "cut short, or something was appended"
    yield "commented", plain[:-2] + b"\1\0!", "something was appended"
    yield "prepended", b"PK\3\4" + bytes(40) + plain, "its parts make"
    yield "hole", plain[:directory] + bytes(16) + shifted(plain[directory:], 16), "and .* in the file"
    yield "wrong_name", plain.replace(b"x/version", b"y/version", 1), "header of x/version is not what"
    yield "wrong_header", plain.replace(b"PK\3\4", b"PK\3\5", 1), "no header of x/data.pkl"
    yield "encrypted", plain[: directory + 8] + b"\1" + plain[directory + 9 :], "compressed or encrypted"
    yield "twice", archive_twice(), "is there twice"
    yield "wrong_place", plain.replace(bytes(4) + b"x/data.pkl", b"\1\0\0\0x/data.pkl"), "before x/data.pkl"
    yield "no_pickle", archive({"x/version": b"3"}), "no data.pkl"
    yield "nothing_inside", archive({}), "no data.pkl"
    yield "big_endian", saved(state(w=tensor()), **{"x/byteorder": b"big"}), "big-endian"
    yield "no_storage", saved(state(w=tensor(key="7"))), "no record 'x/data/7'"
    yield "storage_path", saved(state(w=tensor(key="../../secret"))), "no record 'x/data/../../secret'"
    yield "short_storage", saved(state(w=tensor(size=3))), "x/data/0 has 8 bytes, expected 3 of torch.float32"
    yield "two_kinds", saved(state(a=tensor(), b=tensor(kind="IntStorage"))), "the storage it shares is not"
    yield "behind_storage", saved(state(w=tensor(offset=1))), "not within its storage of 2"
    yield "wide_stride", saved(state(w=tensor(stride=(2,)))), "not within its storage of 2"
    yield "huge_stride", saved(state(w=tensor((0,), (2**64,)))), "not told by whole numbers"
    yield "negative", saved(state(w=tensor(stride=(-1,), offset=1))), "not told by whole numbers"
    yield "uneven", saved(state(w=tensor((2, 1), (1,)))), "not strided numbers"
    yield "truth", saved(state(w=tensor(size=8, kind="BoolStorage", shape=(8,)))), "other bytes than those of true"
    yield "complex", saved(state(w=tensor(kind="ComplexFloatStorage"))), "contains code: torch.ComplexFloatStorage"
    yield "not_a_tensor", saved(state(w=tensor(), v=number(3))), "'v' is int, expected a tensor"
    yield "no_weights", saved(state(epoch=number(3))), "holds no weights"
    yield "a_list", saved(b"\x80\x02](" + tensor() + b"e."), "holds no weights"
    yield "unprintable", saved(state(**{"w\x1b[2J": tensor()})), r"named 'w\\x1b\[2J'"
    yield "twice_named", saved(b"\x80\x02}(" + (text("w") + tensor()) * 2 + b"u."), "the key 'w' twice"
    yield "no_end", saved(state(w=tensor())[:-1]), "damaged before byte"
    yield "too_few", saved(b"\x80\x02\x87."), "too few items"
    yield "no_mark", saved(b"\x80\x02Nt."), "damaged before byte"
    yield "not_known", saved(b"\x80\x02h\x05."), "damaged before byte"
    yield "script_number", scripted(number(3)), "contains code: x/code/__torch__.py"
    yield (
        "script_state",
        scripted(state(w=tensor())[2:-1]),
        r"contains code: x/code/__torch__.py \(TorchScript\), and no",
    )
    yield "script_empty", scripted(module(training=b"\x88")), "its modules have no tensors"
    yield "script_called", scripted(name("__torch__.M") + b")R"), "a call of something that is not to be called"
    yield "script_tuple", scripted(name("__torch__.M") + b")\x81)b"), "attributes of a module that are not told once"
    yield "script_twice", scripted(module(a=tensor()) + b"}" + text("b") + b"Nsb"), "that are not told once"
    yield "script_name", scripted(module(**{"a.b": tensor()})), "attribute 'a.b', which is no name"
    yield "script_number_name", scripted(name("__torch__.M") + b")\x81}" + number(1) + b"Nsb"), "attribute 1, which"
    yield "script_storage", scripted(module(w=tensor(key="7"))), "no record 'x/data/7'"
    yield "script_short", scripted(module(w=tensor(size=3))), "x/data/0 has 8 bytes, expected 3 of torch.float32"
    yield "script_behind", scripted(module(w=tensor(offset=1))), "not within its storage of 2"
    yield "script_other", scripted(module(w=tensor()), **{"x/extra/a": b""}), "x/extra/a: it is not what"
    yield "script_other_root", scripted(module(w=tensor()), **{"y/code/a.py": b""}), "y/code/a.py: it is not what"
    yield "script_code_cut", deflated_code(b"x" * 10_000).replace(b"PK\7\x08", b"PK\7\7"), "in the directory and"
    yield "script_data", archive(records(b"." * 99, **{"x/code/a.py": b""}), zipfile.ZIP_DEFLATED), "is compressed"
    yield "array_objects", described("(1,)", "|O"), "objects would be code"
    yield "array_record", described("(1,)", "f4,f4"), "objects would be code"
    yield "array_big_endian", described("(2,)", ">f4"), "expected plain little-endian numbers"
    yield "array_short", described("(3,)"), "its data are 8 bytes"
    yield "array_negative", described("(-2,)"), "its data are 8 bytes"
    yield "array_words", described("'ab'"), "its data are 8 bytes"
    yield "no_array", archive({"a.npy": b"\x93NUMPY"}), "is no array"
    yield "tensor_short", tensors({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}), "is damaged"
    yield "tensor_lies", tensors({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}), "is damaged"
    yield (
        "tensor_complex",
        tensors({"w": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}),
        "is of torch.complex64",
    )


def deflated_code(content: bytes) -> bytes:
    """An archive of `torch.jit.save` as it writes longer code, compressed, its sizes behind it."""

    class Pipe(io.BytesIO):
        """A file in which nothing can be written over."""

        def tell(self) -> int:
            raise OSError

    file = Pipe()
    with zipfile.ZipFile(file, "w") as made:
        for key, value in records(b"\x80\x02" + module(w=tensor()) + b".", **{"x/constants.pkl": b""}).items():
            made.writestr(key, value)
        made.writestr("x/code/__torch__.py", content, zipfile.ZIP_DEFLATED)
    return file.getvalue()


def shifted(end: bytes, by: int) -> bytes:
    """Directory and end of a zip that begin so many bytes later."""
    return end[:-6] + struct.pack("<LH", struct.unpack("<L", end[-6:-2])[0] + by, 0)


def archive_twice() -> bytes:
    """A zip with two records of one name."""
    content = archive(records(state(weight=tensor()), **{"x/versioo": b"3\n"}))
    return content.replace(b"x/versioo", b"x/version")


def write(path: Path, content: bytes) -> Path:
    """Write a file."""
    path.write_bytes(content)
    return path
