"""What the site takes from outside of docs/: tables, figures and notebooks, at the same place under the site's root.

Pages link to them as GitHub does (`../figures/head_grid.png`); a link that leaves docs/ is turned to the copy. A notebook becomes
a page, its pictures files. mkdocs calls `on_files` and `on_page_markdown` (`hooks:` in mkdocs.yml). Of a link to a file that is
not taken `mkdocs build --strict` complains.
"""

import base64
import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
TAKEN = (
    "CHANGELOG.md", "lofit_lens/organism/README.md", "figures/*.png", "figures/*.csv", "figures/*.md",
    "benchmarks/results/*.json",
)  # fmt: skip
LINK = re.compile(r"(\]\()([^)#\s]+)")  # ](target
NOTEBOOK = ".ipynb"
MATHS = re.compile(r"\$([^$\n]+)\$")  # $z$: Jupyter and GitHub set it; here it is code


def on_files(files: Files, config: Any) -> Files:
    """Add what is taken."""
    for pattern in TAKEN:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    for path in sorted(ROOT.glob(f"notebooks/*{NOTEBOOK}")):
        text, pictures = notebook_page(path)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
        for name, picture in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=picture))
    return files


def notebook_page(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its pictures by name."""
    parts, pictures = [], {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(MATHS.sub(in_text, source))
        else:
            parts.append(f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {"text/plain": output.get("text", "")})
            if "image/png" in data:
                name = f"{path.stem}-{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![Output]({name})")
            elif "text/html" in data:  # Markdown ends an HTML block at an empty line
                lines = [line for line in "".join(data["text/html"]).splitlines() if line.strip()]
                parts.append('<div class="output">' + "\n".join(lines) + "</div>")
            else:
                parts.append(f"```text\n{''.join(data['text/plain']).rstrip()}\n```")
    return "\n\n".join(parts) + "\n", pictures


def in_text(formula: re.Match[str]) -> str:
    """A formula as code: `sqrt(d)`, `z <- z + v`."""
    plain = re.sub(r"\\sqrt\{(.*?)\}", r"sqrt(\1)", formula[1])
    return f"`{plain.replace(chr(92) + 'leftarrow', '<-')}`"


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links that leave docs/, and those to notebooks."""
    source = page.file.abs_src_path
    inside = source is not None and Path(source).is_relative_to(config["docs_dir"])
    here = posixpath.dirname(page.file.src_uri)

    def turned(found: re.Match[str]) -> str:
        if "://" in found[2]:
            return found[0]
        at = posixpath.normpath(posixpath.join("docs" if inside else "", here, found[2]))
        at = at.removeprefix("docs/")
        if at.endswith(NOTEBOOK):
            at = f"{at.removesuffix(NOTEBOOK)}.md"
        if files.get_file_from_path(at) is None:
            return found[0]
        return found[1] + posixpath.relpath(at, here or ".")

    return LINK.sub(turned, markdown)
