"""Draw images with a trained DetailFlow, or rebuild one of your own from ever more tokens.

    python sample.py                                      every class of runs/shapes -> samples.png, coarse_to_fine.png
    python sample.py --run runs/cifar10 --classes cat 5   classes by name or number
    python sample.py --image photo.jpg                    your picture from 1 ... N tokens -> rebuilt.png
    python sample.py --num 1000 --npz out.npz             balanced classes: arr_0 uint8 (1000, R, R, 3), arr_1 labels
    python sample.py --tokenizer FOLDER --ar FOLDER       the authors' published models, downloaded to two folders
    torchrun --nproc-per-node 8 -- sample.py --run runs/imagenet-16 --num 50000 --npz out.npz     all GPUs, restartable
"""
import argparse
import dataclasses
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import torch

import detailflow as df

SETTINGS = ("device", "dtype", "compile", "guidance", "schedule", "temperature", "top_k", "top_p")  # not the run's

def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="runs/shapes", help="folder with tokenizer.pt and ar.pt [runs/shapes]")
    parser.add_argument("--tokenizer", help="another tokenizer: a checkpoint or the authors' folder")
    parser.add_argument("--ar", help="another AR transformer: a checkpoint or the authors' folder")
    parser.add_argument("--out", help="folder for the pictures [the run's folder; samples for the authors']")
    parser.add_argument("--classes", nargs="+", help="names or numbers [all, balanced]")
    parser.add_argument("--num", type=int, help="images in all [8 a class; pictures: of at most 10 classes]")
    parser.add_argument("--tokens", type=int, help="stop after so many tokens: a smaller picture, sooner [N]")
    parser.add_argument("--image", help="a picture to rebuild, in place of drawing")
    parser.add_argument("--npz", help="write the images there instead of pictures")
    parser.add_argument("--seed", type=int, default=0, help="image i has seed + i, whatever the batch [0]")
    parser.add_argument("--batch", type=int, default=100, help="images at once [100]")
    parser.add_argument("--random-classes", action="store_true", help="as the authors' evaluation does")
    parser.add_argument("--bench", nargs="?", const="", metavar="PRESET",
                        help="time drawing at batch 1, 4 and --batch; with a preset: random weights of its sizes")
    parser.add_argument("--no-ema", action="store_true", help="the last weights instead of their average")
    for name in SETTINGS:
        field = df.Config.__dataclass_fields__[name]
        kind = {"action": argparse.BooleanOptionalAction} if field.type is bool else {"type": field.type}
        default = "auto" if field.default == "auto" else "as trained"
        parser.add_argument("--" + name.replace("_", "-"), help=f"{field.metadata['help']} [{default}]", **kind)
    return parser.parse_args(argv)

def class_numbers(wanted, names):
    """Class names or numbers -> numbers. Raises Refused."""
    by_name = {str(i): i for i in range(len(names))} | {name: i for i, name in enumerate(names)}     # names come first
    unknown, known = [w for w in wanted if w not in by_name], textwrap.shorten(", ".join(names), 250)
    df.require(not unknown, f"classes must be among 0..{len(names) - 1}: {known}", ", ".join(unknown))
    return [by_name[w] for w in wanted]

def rebuild(args, tokenizer, machine, out):
    """Write rebuilt.png: the picture from 1 ... N tokens, and itself."""
    picture = df.crop(df.read_picture(args.image), tokenizer.config.image_size)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].to(machine.device)
    out.mkdir(parents=True, exist_ok=True)
    df.save_picture(df.reconstructions(tokenizer, pixels), out / "rebuilt.png")
    print(f"{out / 'rebuilt.png'}: from {df.strip_lengths(tokenizer.config)} tokens, then the picture itself")

def draw(args, tokenizer, model, machine, names, out):
    """Write samples.png and coarse_to_fine.png, or the npz. Raises Refused."""
    shown = 10 if args.num is None and not args.npz else len(names)
    classes = class_numbers(args.classes, names) if args.classes else list(range(len(names)))[:shown]
    count, npz = 8 * len(classes) if args.num is None else args.num, Path(args.npz or "none")
    df.require(1 <= count <= 10**7 and args.batch >= 1, "--num and --batch must be at least 1, --num at most 10000000",
               f"{count} and {args.batch}")
    df.require(machine.world == 1 or args.npz, "several processes must draw into one file: --npz FILE", "none")
    df.require(npz.name and not npz.is_dir(), "--npz must name a file", args.npz)
    lengths = df.prefix_lengths(model.config)
    df.require(args.tokens in (None, *lengths), f"--tokens (num_tokens) must be one of {lengths}", args.tokens)
    columns = max(1, count // len(classes))             # of a picture, which has a row a class, and no remainder
    count = count if args.npz else min(count, columns * len(classes))
    turn, since = torch.arange(count) % len(classes), time.time()
    if args.random_classes:
        u = df.uniform(df.fold(df.root_key(args.seed, "classes"), torch.arange(count)), 1)[:, 0]
        turn = (u * len(classes)).long()
    labels = torch.tensor(classes)[turn]
    config = dataclasses.replace(model.config, seed=args.seed, eval_batch=args.batch)
    if args.npz:
        path = npz.with_suffix(f".{df.short_hash(vars(args), tokenizer, model)}.npy")   # goes on where a killed run was
        drawn = df.draw_images(path, config, machine, tokenizer, model, labels, args.tokens)
        machine.barrier()                                               # until all have opened it
        if machine.rank == 0:
            with df.written_whole(npz) as file:
                np.savez(file, arr_0=drawn["image"], arr_1=drawn["label"].astype(np.int64))
            path.unlink()
        machine.say(f"{npz}: arr_0 {drawn['image'].shape} uint8, arr_1 labels, {time.time() - since:.0f} s")
        return
    out.mkdir(parents=True, exist_ok=True)
    df.prepare_sampling(tokenizer, model, machine, compiled=False)      # which only pays for many images
    batches = df.draw_batches(config, machine, tokenizer, model, labels, range(count), args.tokens)
    _, codes, images = zip(*batches, strict=True)
    order = turn.argsort(stable=True)
    grid = df.to_float(torch.cat(images))[order].unflatten(0, (-1, columns))
    df.save_picture(grid, out / "samples.png")
    passes = len(df.decoding_spans(config, args.tokens or config.num_tokens))
    print(f"{out / 'samples.png'}: {count} images of {grid.shape[-1]} px in {time.time() - since:.1f} s, {passes} "
          f"passes each batch: {', '.join(names[k] for k in dict.fromkeys(labels[order].tolist()))}")
    if args.tokens in (None, config.num_tokens):
        df.save_picture(df.coarse_to_fine(tokenizer, torch.cat(codes)[:8]), out / "coarse_to_fine.png")
        print(f"{out / 'coarse_to_fine.png'}: the first {min(8, count)} from {df.strip_lengths(config)} tokens")

def work(args):
    """Do what the command line asks for. Raises Refused."""
    run = Path(args.run)
    given = {k: v for k, v in vars(args).items() if k in SETTINGS and v is not None}
    machine = df.start_machine(df.Config(**given))
    out = Path(args.out or ("samples" if args.tokenizer else run))
    batches = sorted({1, 4, args.batch})
    if args.bench:
        df.require(args.bench in df.PRESETS, f"--bench must be one of {', '.join(df.PRESETS)}", args.bench)
        models = df.random_models(df.Config(**df.PRESETS[args.bench] | given), machine)
        return df.bench_sampling(df.Bench(machine), *models, batches)
    tokenizer, _ = df.load_model(args.tokenizer or run / "tokenizer.pt", "tokenizer", machine.device, not args.no_ema)
    if args.image:
        return rebuild(args, tokenizer, machine, out)
    model, names = df.load_ar(args.ar or run / "ar.pt", tokenizer, machine.device, not args.no_ema)
    model.config = dataclasses.replace(model.config, **given)
    if args.bench == "":                                # of the run's own models
        return df.bench_sampling(df.Bench(machine), tokenizer, model, batches)
    draw(args, tokenizer, model, machine, names or [str(i) for i in range(model.config.num_classes)], out)

def main(argv=None):
    """Run the command line -> exit status: 0, 2 for a user's mistake, 130 or 143 when interrupted."""
    args = parse(argv)
    return df.guarded("sample.py", lambda: work(args), "with --npz the same command goes on from there")

if __name__ == "__main__":
    sys.exit(main())
