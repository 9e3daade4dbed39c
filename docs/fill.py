"""Put the committed tables into the pages: below each line `<!-- table: PATH -->` stands that of the file.

python docs/fill.py
"""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLACE = re.compile(r"(<!-- table: (\S+) -->\n\n)(?:\|.*\n)*\n*")


def filled(text: str) -> str:
    """A page with the tables as they are in their files, without the captions."""

    def table(found: re.Match) -> str:
        lines = (ROOT / found[2]).read_text(encoding="utf-8").splitlines()
        return found[1] + "".join(f"{line}\n" for line in lines if line.startswith("|")) + "\n"

    return PLACE.sub(table, text)


def main() -> None:
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
