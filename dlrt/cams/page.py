"""A comparison as one page for a browser: a slider over compression, and a table to sort."""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from dlrt.cams.pictures import overlay
from dlrt.cams.summary import read_study, readable, summarise
from dlrt.checkpoint import atomic_write
from dlrt.errors import KEPT
from dlrt.runs import read_options

DRAWN = ("reference", "low-rank", "SVD")  # the controls are in the table alone
PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 15px/1.4 sans-serif; margin: 1.5em auto; max-width: 75em; padding: 0 1em }}
.maps {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: 1em }}
figure {{ margin: 0 }} figure img {{ width: 49%; image-rendering: pixelated }}
input {{ width: 100% }} [hidden] {{ display: none }}
.scroll {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-size: 13px }} th, td {{ padding: .3em .6em; text-align: left }}
th button {{ font: inherit; font-weight: bold; border: 0; background: none; cursor: pointer }}
tbody tr:nth-child(odd) {{ background: #f2f2f2 }}
</style>
<h1>{title}</h1>
<p>On the left each picture, on the right the map of the class that the dense network predicts.</p>
<label>Compression: <output id="shown"></output>
<input id="slider" type="range" min="0" max="{last}" value="0"></label>
<div class="maps">{figures}</div>
<h2>All networks</h2>
<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>
<script>
{script}
</script>
</html>
"""
SCRIPT = """const slider = document.getElementById("slider");
const names = {names};
function show() {
  document.getElementById("shown").textContent = names[slider.value];
  for (const image of document.querySelectorAll("img[data-network]"))
    image.hidden = image.dataset.network !== slider.value;
}
slider.addEventListener("input", show);
show();

const body = document.querySelector("tbody");
document.querySelectorAll("th button").forEach((button, column) => {
  let up = false;
  button.addEventListener("click", () => {
    up = !up;
    const value = row => row.cells[column].textContent;
    const compare = (a, b) => {
      const [x, y] = [parseFloat(value(a)), parseFloat(value(b))];
      if (isNaN(x) || isNaN(y)) return isNaN(x) - isNaN(y) || value(a).localeCompare(value(b));
      return x - y;
    };
    const rows = [...body.rows].sort(compare);
    body.append(...(up ? rows : rows.reverse()));
  });
});"""


def write_page(folder: Path) -> Path:
    """Make page.html of a complete comparison's folder; FileNotFoundError where it is not complete."""
    summary = summarise(read_study(folder))
    reference, *others = (summary[summary["kind"] == kind] for kind in DRAWN)
    drawn = pd.concat([reference, pd.concat(others).sort_values("compression", kind="stable")])
    names = [f"{row.compression:.0f} %, {row.network}, r = {row.pearson:.3f}" for row in drawn.itertuples()]
    table = readable(folder.name, read_options(folder), summary).drop(columns="study")
    text = PAGE.format(
        title=html.escape(f"Class-activation maps: {folder.name}"),
        last=len(drawn) - 1,
        figures=_figures(folder, drawn),
        head="".join(f"<th><button>{html.escape(name)}</button></th>" for name in table),
        rows="".join(f"<tr>{_cells(row)}</tr>\n" for row in table.itertuples(index=False)),
        script=SCRIPT.replace("{names}", _javascript(names)),
    )
    path = folder / "page.html"
    atomic_write(path, lambda file: file.write(text.encode()), KEPT)
    return path


def _figures(folder: Path, drawn: pd.DataFrame) -> str:
    """A figure for each picture: itself and its map by every network, of which one is shown."""
    with np.load(folder / "pictures.npz") as file:
        pictures = {name: file[name] for name in file}
    maps = [np.load(folder / f"{name}.npz")["displayed"].astype(np.float32) for name in drawn["network"]]
    figures = []
    for index, (name, pixels) in enumerate(pictures.items()):
        images = [f'<img src="{_data(pixels)}" alt="{html.escape(name)}">']
        for network, displayed in enumerate(maps):
            shown = overlay(np.float32(pixels / 255), displayed[index])
            alt = "map" if np.isfinite(displayed[index]).all() else "undefined map"
            hidden = " hidden" if network else ""
            images.append(f'<img data-network="{network}" src="{_data(shown)}" alt="{alt}"{hidden}>')
        figures.append(f"<figure>{''.join(images)}<figcaption>{html.escape(name)}</figcaption></figure>\n")
    return "".join(figures)


def _data(pixels: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="WebP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def _cells(row: tuple) -> str:
    return "".join(f"<td>{html.escape(str(value))}</td>" for value in row)


def _javascript(names: list[str]) -> str:
    """Texts as a list of a script, in which no text can end the script."""
    return json.dumps(names).replace("<", "\\u003c")
