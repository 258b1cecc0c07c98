"""Packs a finished run into one small file of the package, which `msvit.load(NAME)` reads.

msvit train --data scenes:middle --epochs-dense 10 --epochs 12 --folder runs/scenes     # minutes on one core
python benchmarks/ship.py runs/scenes scenes --title "built-in scenes, middle" --command "msvit train ..."
"""

import argparse
from pathlib import Path

from msvit.models.hub import load_folder
from msvit.models.msvit import MSViT
from msvit.models.shipped import Card, card, pack
from msvit.training.build import load_data
from msvit.training.runs import read_finished


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("name", help="what msvit.load calls it")
    parser.add_argument("--title", required=True, help="what it is, in a few words")
    parser.add_argument("--command", required=True, help="the command that trained it, for the card")
    parser.add_argument("--classes", default="", help="what people call the classes, comma-separated, in their order")
    args = parser.parse_args()

    run = read_finished(args.run)
    loaders = load_data(run.recipe.data, run.recipe.training.seed, load_folder(MSViT, str(args.run)))
    classes = [name.strip() for name in args.classes.split(",")] if args.classes else run.summary["classes"]
    if len(classes) != len(run.summary["classes"]):
        parser.error(f"--classes names {len(classes)}, and the run has {len(run.summary['classes'])}")
    began = run if "dense_accuracy" in run.summary else read_finished(Path(run.recipe.model.name).parent)  # RUN/dense
    found = {name: round(run.summary[name], 4) for name in ("accuracy", "macs")}
    found["dense_accuracy"] = round(began.summary["dense_accuracy"], 4)
    source = run.recipe.data.source
    about = Card(
        title=args.title,
        data=f"folder:{Path(source[7:]).name}" if source.startswith("folder:") else source,
        classes=tuple(classes),
        mean=tuple(loaders.mean),
        std=tuple(loaders.std),
        command=args.command,
        **found,
    )
    path = pack(args.run, args.name, about)
    print(f"{path}: {path.stat().st_size / 1e3:.0f} kB\n{card(args.name)}")


if __name__ == "__main__":
    main()
