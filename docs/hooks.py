"""Pages whose text stands elsewhere in the repository: mkdocs asks for them here."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
ELSEWHERE = {"kernels.md": "kernels/README.md"}


def on_page_markdown(markdown: str, page, config, files) -> str:
    """The README of the kernels, without its links into the source: the site has no pages of it."""
    source = ELSEWHERE.get(page.file.src_uri)
    if source is None:
        return markdown
    return re.sub(r"\[([^\]]+)\]\((?!http)[^)]+\)", r"\1", (ROOT / source).read_text(encoding="utf-8"))
