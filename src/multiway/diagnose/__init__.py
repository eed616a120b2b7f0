"""``multiway diagnose``: what hides, what attends, what is represented, what is filled in, and how losses scale.

One module per question, each with ``run(...)``: it writes a folder with plots (PNG), their figures (JSON) and one page
that needs no network, and returns the page's path.
"""
