"""Pages of the site that nobody writes twice: the repository's own pages, and one reference page per package."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "multiway"
LINK = re.compile(r"\[([^\]]+)\]\((?!https?:|#)([^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages at the root of the repository (README as the index) and the reference."""
    roots = {path.name: path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("*.md"))}
    pages = roots.keys() | {file.src_uri for file in files.documentation_pages()}
    for name, text in roots.items():
        followed = LINK.sub(lambda link: follow(link, pages), text)
        files.append(File.generated(config, name.replace("README", "index"), content=followed))
    for path in sorted(PACKAGE.iterdir()):
        if not path.name.startswith("_") and (path.suffix == ".py" or (path / "__init__.py").exists()):
            content = f"---\ntitle: {path.stem}\n---\n\n::: multiway.{path.stem}\n"
            files.append(File.generated(config, f"reference/{path.stem}.md", content=content))
    return files


def follow(link: re.Match[str], pages: set[str]) -> str:
    """A link to a page leads to that page of the site; a link into the source tree keeps only its words."""
    words, target = link.groups()
    page, hash_sign, anchor = target.removeprefix("docs/").partition("#")
    return f"[{words}]({page.replace('README', 'index')}{hash_sign}{anchor})" if page in pages else words
