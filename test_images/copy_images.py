"""Copy the four photographs of this folder from the installed scikit-image, where their licences are told.

python test_images/copy_images.py        prints the four names
"""

import shutil
from pathlib import Path

import skimage

NAMES = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")


def main() -> None:
    folder = Path(__file__).parent
    for name in NAMES:
        shutil.copyfile(Path(skimage.__file__).parent / "data" / name, folder / name)
        print(folder / name)


if __name__ == "__main__":
    main()
