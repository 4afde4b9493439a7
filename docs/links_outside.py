"""mkdocs: pages link files of the repository outside of docs/, which go into the site, too, under repository/."""

import re
from pathlib import Path

from mkdocs.structure.files import File

OUTSIDE = re.compile(r"(?<=\]\()(?:\.\./)+(?!\.)([^)#]+)")
NOT_IN_DOCS = re.compile(r"(?<=\]\()docs/")


def on_files(files, config):
    """Add what the pages link to, and what those link to."""
    root, added = Path(config.config_file_path).parent, set()
    texts = [(Path(config.docs_dir), page.content_string) for page in files.documentation_pages()]
    while texts:
        folder, text = texts.pop()
        for link in OUTSIDE.finditer(text):
            path = (folder / link[0]).resolve().relative_to(root)
            if path in added:
                continue
            added.add(path)
            target = root / path
            if target.is_dir():
                target, path = target / "README.md", path / "README.md"
            files.append(File.generated(config, f"repository/{path.as_posix()}", abs_src_path=str(target)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Point links at the copies."""
    source = page.file.src_uri
    if source.startswith("repository/"):
        up = "../" * source.count("/")
        return NOT_IN_DOCS.sub(up, markdown)
    return OUTSIDE.sub(lambda link: f"repository/{link[1]}", markdown)
