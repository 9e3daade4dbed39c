"""Write digits in clutter as pictures, with labels.csv, which names the class and the box of each.

python pytorch-grad-cam/clutter_pictures.py FOLDER --count 8        prints the folder
"""

from pathlib import Path

from PIL import Image

from dlrt import cli
from dlrt.cams.pictures import read_labels
from dlrt.clutter import clutter


def main() -> None:
    parser = cli.Parser(description=__doc__, formatter_class=cli.HelpFormatter)
    parser.add_argument("folder", type=Path, help="made if it is not there")
    parser.add_argument("--count", type=cli.NATURAL, default=8, help="of pictures")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    table = args.folder / "labels.csv"
    for name in read_labels(table, int) if table.is_file() else ():  # of an earlier call, maybe with more
        (args.folder / name).unlink(missing_ok=True)
    made = clutter(args.count, seed=0, test=True)
    lines = ["file,class"]
    for number, (image, label, box) in enumerate(zip(made.images, made.labels, made.boxes, strict=True)):
        name = f"digit_{number:03d}.png"
        Image.fromarray(image).save(args.folder / name)
        lines.append(f"{name},{label},box={' '.join(map(str, box))}")
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(args.folder)


if __name__ == "__main__":
    main()
