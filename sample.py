"""Draw images with a trained DetailFlow, or rebuild one of your own from ever more tokens.

    python sample.py                                      every class of runs/shapes -> samples.png, coarse_to_fine.png
    python sample.py --run runs/cifar10 --classes cat 5   classes by name or number
    python sample.py --image photo.jpg                    your picture from 1 ... N tokens -> rebuilt.png
    python sample.py --num 1000 --npz out.npz             balanced classes: arr_0 uint8 (1000, R, R, 3), arr_1 labels
"""
import argparse
import dataclasses
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import detailflow as df

SETTINGS = ("device", "dtype", "guidance", "schedule", "temperature", "top_k", "top_p")    # these override the run's


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="runs/shapes", help="folder with tokenizer.pt and ar.pt [runs/shapes]")
    parser.add_argument("--out", help="folder for the pictures [the run's folder]")
    parser.add_argument("--classes", nargs="+", help="names or numbers [all, balanced]")
    parser.add_argument("--num", type=int, help="images in all [8 a class, of at most 10 classes]")
    parser.add_argument("--tokens", type=int, help="stop after so many tokens: a smaller picture, sooner [N]")
    parser.add_argument("--image", help="a picture to rebuild, in place of drawing")
    parser.add_argument("--npz", help="write the images there instead of pictures")
    parser.add_argument("--seed", type=int, default=0, help="image i has seed + i, whatever the batch [0]")
    parser.add_argument("--batch", type=int, default=100, help="images at once [100]")
    parser.add_argument("--no-ema", action="store_true", help="the last weights instead of their average")
    for name in SETTINGS:
        field = df.Config.__dataclass_fields__[name]
        text = field.metadata["help"] + " [as trained]"
        parser.add_argument("--" + name.replace("_", "-"), type=field.type, help=text)
    return parser.parse_args(argv)


def class_numbers(wanted, names):
    """Class names or numbers -> numbers. Raises Refused."""
    by_name = {name: i for i, name in enumerate(names)} | {str(i): i for i in range(len(names))}
    if unknown := [w for w in wanted if w not in by_name]:
        raise df.Refused(f"no class {', '.join(unknown)}; there are 0..{len(names) - 1}: {', '.join(names[:20])}"
                         + (", ..." if len(names) > 20 else ""))
    return [by_name[w] for w in wanted]


def rebuild(args, tokenizer, machine, out):
    """Write rebuilt.png: the picture from 1 ... N tokens, and itself."""
    try:
        with Image.open(args.image) as image:
            picture = df.crop(image.convert("RGB"), tokenizer.config.image_size)
    except (OSError, ValueError) as error:
        raise df.Refused(f"--image {args.image} can't be read as a picture ({error})") from error
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].to(machine.device)
    df.save_picture(df.reconstructions(tokenizer, pixels), out / "rebuilt.png")
    print(f"{out / 'rebuilt.png'}: from {df.strip_lengths(tokenizer.config)} tokens, then the picture itself")


def draw(args, tokenizer, model, machine, names, out):
    """Write samples.png and coarse_to_fine.png, or the npz."""
    config = model.config
    classes = class_numbers(args.classes, names) if args.classes else list(range(len(names)))
    if args.num is None and not args.npz:
        classes = classes[:10] if not args.classes else classes
    count = args.num if args.num is not None else 8 * len(classes)
    if count < 1 or args.batch < 1:
        raise df.Refused(f"--num and --batch must be at least 1, got {count} and {args.batch}")
    labels, numbers = torch.tensor([classes[i % len(classes)] for i in range(count)]), torch.arange(count)
    images, codes, since = [], [], time.time()
    for y, i in zip(labels.split(args.batch), numbers.split(args.batch), strict=True):
        with machine.autocast():
            settings = df.sampling_settings(config) | {"seeds": args.seed + i, "num_tokens": args.tokens}
            codes.append(df.generate(model, y, **settings))
            images.append(df.to_uint8(tokenizer.decode(codes[-1])).cpu())
    images, seconds = torch.cat(images), time.time() - since
    passes = len(df.decoding_spans(config, args.tokens or config.num_tokens))
    print(f"{count} images of {images.shape[-1]} px in {seconds:.1f} s, {passes} passes each batch")
    if args.npz:
        np.savez(args.npz, arr_0=images.permute(0, 2, 3, 1).numpy(), arr_1=labels.numpy())
        print(f"{args.npz}: arr_0 {tuple(images.permute(0, 2, 3, 1).shape)} uint8, arr_1 {count} labels")
        return
    order, columns = labels.argsort(stable=True), max(1, count // len(classes))
    grid = df.to_float(images[order][:count // columns * columns]).unflatten(0, (-1, columns))
    df.save_picture(grid, out / "samples.png")
    print(f"{out / 'samples.png'}: {', '.join(names[k] for k in dict.fromkeys(labels[order].tolist()))}")
    if args.tokens in (None, config.num_tokens):
        df.save_picture(df.coarse_to_fine(tokenizer, torch.cat(codes)[:8]), out / "coarse_to_fine.png")
        print(f"{out / 'coarse_to_fine.png'}: the first {min(8, count)} from {df.strip_lengths(config)} tokens")


def main(argv=None):
    args = parse(argv)
    try:
        run = Path(args.run)
        tokenizer, about = df.load_model(run / "tokenizer.pt", "tokenizer", ema=not args.no_ema)
        given = {k: v for k, v in vars(args).items() if k in SETTINGS and v is not None}
        machine = df.start_machine(dataclasses.replace(tokenizer.config, **given))
        tokenizer.to(machine.device)
        out = Path(args.out or run)
        out.mkdir(parents=True, exist_ok=True)
        if args.image:
            rebuild(args, tokenizer, machine, out)
            return 0
        model, _ = df.load_model(run / "ar.pt", "ar", machine.device, ema=not args.no_ema)
        model.config = dataclasses.replace(model.config, **given)
        draw(args, tokenizer, model, machine, about["classes"], out)
        return 0
    except (df.Refused, OSError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
