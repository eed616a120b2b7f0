"""The quickstart's report: what a model does with scenes it never saw, as one page that needs nothing else."""
