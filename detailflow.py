"""DetailFlow in one file: 1D coarse-to-fine image generation by next-detail prediction (arXiv 2505.21473).

An image becomes N discrete tokens, ordered from global to fine: the first n of them decode to the image at resolution
R(n), so each token adds detail to what is there. The order comes from supervision alone: a fifth of a training batch
decodes only a prefix, against a degraded image. A class-conditional transformer then generates the tokens: the first
group of G one by one (they fix the layout), every later group in one pass: G + N/G - 1 passes in all. Tokens sampled in
parallel cannot see each other, and so err. Hence the tokenizer learns to make up for a corrupted group in later tokens
(self-correction), and from such sequences the transformer learns to repair its own errors.

    image (B, 3, R, R) --patches--> encoder <--N learned queries          stage 1: --stage tokenizer
            |                          | group-causal: token i never depends on later groups
            |                       latents (B, N, C) --nearest code--> codes (B, N)
            |   degrade to R(n)                                           |    |
            +---------> target <--loss-- decoder <--first n vectors-------+    | extracted once, with repaired
                                                                               | sequences, into one file
    class ----> AR transformer --logits (B, N, V)--> loss <--------------------+  stage 2: --stage ar
            +-> G + N/G - 1 passes --> codes --> decoder --> image            sample.py

Run       python detailflow.py                   all stages, on synthetic shapes: minutes, no download
          python sample.py                       more samples from what was trained
          python -m pytest -q                    the claims of this file, tested

Letters   B batch, N tokens, n prefix length, G group size, c causal_num (first tokens drawn one by one), V codebook
          size, C code dimension, D width (E the decoder's), R image side, S side of what is decoded, p patch side,
          P patches, T positions in a pass, h heads
Words     token: a position in the sequence; query: its learned input to the encoder; latent: its output there; code:
          index of the nearest codebook row; vector: that row; spoilt: swapped for near codes (paper: noisy); machine:
          this process's device and share of the work; EMA: weights averaged over training (exponential moving average)

Contents  1 randomness as a function    2 settings (for reference: begin at 3)
          the paper       3 resolution mapping R(n)    4 the mask    5 vision transformer    6 quantiser
                          7 tokenizer and self-correction    8 adversarial loss    9 AR transformer    10 generation
          at its scale    11 published weights: the authors' models, SigLIP 2, LPIPS, DINO (skip it at first)
          making it real  12 data    13 training, shared    14 pictures    15 tokenizer stage    16 AR stage    17 FID
                          18 evaluation    19 benchmark    20 command line

Find      what a prefix must show: resolution, degrade (3)         what the mask forbids: group_causal_mask (4)
          where gradients are cut: Quantizer.forward (6), Tokenizer.correct (7)
          where a group's tokens get their positions: rotary_table (9), ARTransformer.embed (9)
          what is cached: Tokenizer.encode_patches (7), ARTransformer.new_cache (9), extract_codes (16)
          what is downloaded: WEIGHTS (11)                         what a training step does: train_tokenizer (15)
          path of an image: patchify (5), Tokenizer.encode_patches, Tokenizer.encode_queries (7), Quantizer.forward (6),
          Tokenizer.decode_vectors (7); of its codes: ARTransformer.embed, ARTransformer.run (9), draw_codes (10)
          what to change: BUILT_IN, open_data (12) for other data; to condition on a text vector, not on a class:
          ARTransformer.embed (9), generate (10), extract_codes (16)

We follow the authors' code (ByteFlow-AI/DetailFlow), which made the published models, where it differs from the paper.
Where we differ from it (read this last). For speed: generation keeps a KV cache, and both passes of self-correction
share the patches. So that the number of GPUs hardly matters: each image, and each of its ten crops, has its own spoilt
group, dropout and augmentation; in every step a fifth of the batch decodes a prefix, the same on all GPUs (theirs draws
for each GPU: all of its batch or none); LeCam's means are global, and saved. For safety: codes are chosen in float32;
steps with non-finite gradients are skipped; the EMA warms up, or the random start would linger in it; the discriminator
first sees images when its loss starts. The codebook starts uniform on the sphere, not in a cube. Evaluation: classes
are balanced, unless random ones are asked for. Small presets, trained from scratch, use neither LPIPS nor first-token
alignment nor a discriminator, but Muon, restarts of dead codes, a larger initial scale of queries, and (cifar10) a
perceptual loss in features of the program's own (ClassFeatures), and a transformer that starts with the codebook's
geometry and sees shifted crops, against overfitting; the imagenet presets follow the authors in all of this. (The small
discriminator, --disc patch, keeps its push on an image to disc_weight times the pixel loss's.)
"""
import argparse
import contextlib
import copy
import datetime
import fcntl
import functools
import hashlib
import itertools
import json
import math
import os
import pickle
import re
import resource
import signal
import sys
import time
import traceback
import types
import urllib.request
import warnings
import zipfile
from collections import OrderedDict, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import functional as TF
from tqdm import tqdm


class Refused(ValueError):
    """A user's mistake. main() prints its one line, without a traceback, and exits with status 2."""

def require(good, wanted, got):
    """Raise Refused unless good."""
    if not good:
        raise Refused(f"{wanted}, got {got}")

def check(x, name, shape, most=None):
    """Refuse x unless it is a tensor of this shape (a letter: any size) of floats or, with `most`, integers 0..most."""
    require(isinstance(x, torch.Tensor), f"{name} must be a tensor", type(x).__name__)
    sizes = len(x.shape) == len(shape) and all(n == w or type(w) is str for n, w in zip(x.shape, shape, strict=True))
    integers = x.dtype in (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)
    require(sizes and x.numel() and (x.is_floating_point() if most is None else integers), f"{name} must be "
            f"{'floats' if most is None else 'integers'} ({', '.join(map(str, shape))})", f"{x.dtype} {tuple(x.shape)}")
    if most is None:
        require(x.isfinite().all(), f"{name} must be finite", "nan or inf")
    else:
        low, high = x.min().item(), x.max().item()      # (numbers: `most` may be too large for the tensor's dtype)
        require(0 <= low and high <= most, f"{name} must lie in 0..{most}", x.flatten()[:9].tolist())

@contextlib.contextmanager
def blame(what, remedy=""):
    """Blame any error inside on what the user gave, such as a torn, foreign or hostile file: it can raise just about
    anything. Raises Refused, one line."""
    try:
        yield
    except torch.OutOfMemoryError:                      # of the GPU: that is not what was given
        raise
    except Exception as error:
        kind, reason = type(error).__name__, " ".join(str(error).split()).split(". ")[0][:200]
        raise Refused(f"{what} ({reason if kind == 'Refused' else f'{kind}: {reason}'}){remedy}") from error

# == 1. Randomness as a function =======================================================================================

# Every random number of a run is a pure function of the seed, its purpose and its sample (as with JAX's keys): there is
# no generator state to save. So a killed run resumes as if never stopped, two GPUs train like one, and image i looks
# the same in a batch of 1 or of 64. For an int64 tensor i, uniform(fold(root_key(seed, "codes"), i), 3) gives three
# numbers for each sample in i. (Only initial weights and the order of images come from torch's own generators, seeded.)

GOLDEN, MIX_1, MIX_2 = (c - 2**64 for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))   # as int64

def mix(z):
    """Scramble an int64 tensor element by element: the finaliser of splitmix64, a well mixing bijection of 64 bits.
    (The masks make torch's signed shifts unsigned.)"""
    z = (z ^ ((z >> 30) & (2**34 - 1))) * MIX_1
    z = (z ^ ((z >> 27) & (2**37 - 1))) * MIX_2
    return z ^ ((z >> 31) & (2**33 - 1))

def fold(keys, number):
    """New int64 keys from old ones and a number (int, or int64 tensor): one key for each purpose or sample."""
    number = torch.full_like(keys, number) if isinstance(number, int) else number
    return mix(keys + (number + 1) * GOLDEN)

def uniform(keys, count):
    """`count` float32 multiples of 2^-24 in [0, 1) for each key: (B,) int64 -> (B, count)."""
    counter = (torch.arange(1, count + 1, device=keys.device) | 0) * GOLDEN     # without | 0 compiled as an int32 index
    return ((mix(keys[:, None] + counter) >> 40) & 0xFFFFFF).float() * 2**-24

def root_key(seed, purpose):
    """The key, (1,) int64, that belongs to a seed and a purpose named by a string."""
    return fold(torch.tensor([seed]), int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:6], "big"))

def dropout(x, rate, keys, site):
    """Dropout whose mask depends only on each sample's key and on the place (site). Without keys: none."""
    if keys is None or rate == 0:
        return x
    keep = uniform(fold(keys, site), x[0].numel()).view_as(x) >= rate
    return x * keep / (1 - rate)

# == 2. Settings =======================================================================================================

def setting(group, default, help, low=0, high=10**9, one_of=None):
    """A field of Config: its help text is its comment, and --help prints it. Numbers must lie in low..high."""
    return field(default=default, metadata={"group": group, "help": help, "range": (low, high), "one_of": one_of})

GPT_SIZES = {"B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1280, 36, 20)}

@dataclass
class Config:
    """Every setting with its default, the `shapes` preset; the command line is made from this. Raises Refused when
    settings are impossible, on their own or together."""
    out: str = setting("run", "", "folder for checkpoints, logs and pictures [runs/PRESET]")
    seed: int = setting("run", 0, "seed of everything: weights, order of images, augmentation, samples")
    device: str = setting("run", "auto", "auto, cpu, cuda or cuda:0, ...")
    dtype: str = setting("run", "auto", "auto: bfloat16 on CUDA, else float32", one_of=("auto", "float32", "bfloat16"))
    compile: bool = setting("run", False, "torch.compile: layers in training, CUDA graphs in sampling")
    workers: int = setting("run", 4, "processes that decode image files", high=256)
    weights: str = setting("run", "", "folder of published weights, downloaded into it when missing [torch's cache]")
    tokenizer: str = setting("run", "", "a tokenizer to use, ours or the authors' folder [OUT/tokenizer.pt]")
    ar: str = setting("run", "", "an AR transformer to measure, ours or the authors' folder [OUT/ar.pt]")
    log_every: int = setting("run", 100, "steps between two lines of the log", 1)
    save_every: int = setting("run", 500, "steps between two checkpoints, each with a picture", 1)
    optimizer: str = setting("training", "muon", "for the transformers' matrices", one_of=("muon", "adamw"))
    grad_accum: int = setting("training", 1, "gradient accumulation: parts of each process's batch", 1)
    data: str = setting("data", "shapes", "shapes (drawn), cifar10 (downloaded) or a folder of image class folders")
    image_size: int = setting("data", 32, "R, side of the square images in pixels", 1, 8192)
    num_classes: int = setting("data", 10, "classes; training takes it from the data", 1, 1000000)
    crop: float = setting("data", 0.8, "folders: a training crop shows at least this share of a side", 0.1, 1)
    num_tokens: int = setting("tokenizer", 16, "N, tokens of an image", 2, 4096)
    group_size: int = setting("tokenizer", 4, "G, tokens drawn in one pass", 1, 4096)
    causal_num: int = setting("tokenizer", -1, "c, first tokens, drawn one by one: a multiple of G; -1: G", -1, 4096)
    alpha: float = setting("tokenizer", 1.5, "exponent of the resolution mapping R(n)", 0.01, 10)
    patch_size: int = setting("tokenizer", 8, "p, side of a patch in pixels", 1, 1024)
    dec_patch_size: int = setting("tokenizer", 0, "decoder: side of a patch; 0: as the encoder's", high=1024)
    codebook_size: int = setting("tokenizer", 512, "V, codes in the codebook", 2, 65536)
    code_dim: int = setting("tokenizer", 8, "C, dimension of a code", 1, 4096)
    enc_width: int = setting("tokenizer", 96, "encoder: width", 1, 16384)
    enc_depth: int = setting("tokenizer", 3, "encoder: layers", 1, 256)
    enc_heads: int = setting("tokenizer", 3, "encoder: attention heads", 1, 256)
    enc_mlp: int = setting("tokenizer", 0, "encoder: MLP width; 0: four times the width", high=65536)
    enc_grid: int = setting("tokenizer", 0, "encoder: side of the table of positions; 0: of the patches' grid", 0, 1024)
    dec_width: int = setting("tokenizer", 96, "decoder: width", 1, 16384)
    dec_depth: int = setting("tokenizer", 3, "decoder: layers", 1, 256)
    dec_heads: int = setting("tokenizer", 3, "decoder: attention heads", 1, 256)
    dec_mlp: int = setting("tokenizer", 0, "decoder: MLP width; 0: four times the width", high=65536)
    dec_grid: int = setting("tokenizer", 0, "decoder: side of the table of positions; 0: of the patches' grid", 0, 1024)
    tok_steps: int = setting("tokenizer training", 2500, "optimiser steps", 1)
    tok_batch: int = setting("tokenizer training", 16, "images per step, over all processes", 1)
    tok_lr: float = setting("tokenizer training", 2e-3, "peak learning rate (authors: 1e-4 tok_batch / 256)", high=1)
    tok_warmup: int = setting("tokenizer training", 100, "steps of linear warm-up")
    tok_ema: float = setting("tokenizer training", 0.99, "decay of the EMA of weights; 0: none", high=0.99999)
    coarse_prob: float = setting("tokenizer training", 0.2, "share of each batch that decodes a random prefix", high=1)
    correction: bool = setting("tokenizer training", True, "train self-correction")
    noise_topk: int = setting("tokenizer training", 50, "self-correction: nearest codes to draw a spoilt one from", 1)
    min_size: int = setting("tokenizer training", 0, "dynamic resolution: smallest side images are shrunk to", 0, 8192)
    dynamic_prob: float = setting("tokenizer training", 0.0, "dynamic resolution: share of batches shrunk", high=1)
    commit_weight: float = setting("tokenizer training", 0.25, "beta, weight of the commitment loss")
    revive_every: int = setting("tokenizer training", 50, "steps between restarts of dead codes, early on; 0: never")
    init_std: float = setting("tokenizer training", 0.3, "initial std of queries and positions; 0: the authors'")
    enc_init: str = setting("tokenizer training", "random", "encoder starts from", one_of=("random", "siglip2"))
    align_weight: float = setting("tokenizer training", 0.0, "weight of first-token alignment with SigLIP 2; 0: none")
    align_width: int = setting("tokenizer training", 1024, "first-token alignment: width of its MLP", 1, 65536)
    teacher_width: int = setting("tokenizer training", 1152, "first-token alignment: width of the teacher", 1, 65536)
    perceptual_weight: float = setting("tokenizer training", 0.0, "weight of the perceptual loss; 0: none")
    perceptual: str = setting("tokenizer training", "own", "whose features: the paper's LPIPS, or a small "
                              "network's, first trained to tell the data's classes", one_of=("own", "lpips"))
    perceptual_images: int = setting("tokenizer training", 200000, "training images that teach the small network", 1)
    disc: str = setting("tokenizer training", "patch", "discriminator: small, or the paper's", one_of=("patch", "dino"))
    disc_weight: float = setting("tokenizer training", 0.0, "weight of the adversarial loss; 0: none")
    disc_start: int = setting("tokenizer training", 2000, "step at which the adversarial loss starts")
    gpt: str = setting("AR transformer", "", "B, L or XL set width, depth and heads", one_of=("", "B", "L", "XL"))
    ar_width: int = setting("AR transformer", 160, "width", 1, 16384)
    ar_depth: int = setting("AR transformer", 4, "layers", 1, 256)
    ar_heads: int = setting("AR transformer", 4, "attention heads", 1, 256)
    ar_mlp: int = setting("AR transformer", 0, "SwiGLU width; 0: 8/3 of the width, up to a multiple of 256", 0, 65536)
    dropout: float = setting("AR transformer", 0.1, "dropout of inputs, attention and MLP outputs", high=0.99)
    class_dropout: float = setting("AR transformer", 0.1, "share of labels replaced by the null class, for CFG", high=1)
    ar_steps: int = setting("AR training", 1000, "optimiser steps", 1)
    ar_batch: int = setting("AR training", 64, "sequences per step, over all processes", 1)
    ar_lr: float = setting("AR training", 1e-3, "peak learning rate", high=1)
    ar_warmup: int = setting("AR training", 50, "steps of linear warm-up")
    ar_ema: float = setting("AR training", 0.99, "decay of the EMA of weights; 0: none", high=0.99999)
    ar_weight_decay: float = setting("AR training", 0.05, "weight decay of matrices and embeddings")
    correction_share: float = setting("AR training", 0.3, "share of self-corrected sequences", high=1)
    codebook_start: bool = setting("AR training", False, "codes' embeddings and logits start from the codebook")
    shift: int = setting("AR training", 0, "built-in sets: pixels by which its ten crops are shifted; 0: none", high=64)
    guidance: float = setting("sampling", 2.0, "classifier-free guidance scale; 1: none, half the work")
    schedule: str = setting("sampling", "constant", "guidance along the groups", one_of=("constant", "linear"))
    temperature: float = setting("sampling", 1.0, "sampling temperature; 0: greedy")
    top_k: int = setting("sampling", 0, "draw among the k likeliest codes; 0: all")
    top_p: float = setting("sampling", 1.0, "draw among the likeliest codes of this total probability", 1e-6, 1)
    eval_samples: int = setting("evaluation", 2000, "images generated to measure FID", 2)
    eval_batch: int = setting("evaluation", 250, "images per batch of evaluation and token extraction", 1)
    inception: str = setting("evaluation", "none", "Inception weights for FID: a file, auto (95 MB download) or none")
    reference: str = setting("evaluation", "", "npz with mu and sigma to compare samples with [training images]")

    def __post_init__(self):
        for f in fields(self):
            value, choices, (low, high) = getattr(self, f.name), f.metadata["one_of"], f.metadata["range"]
            if f.type is float and type(value) in (int, np.float64):
                setattr(self, f.name, value := float(value))
            require(type(value) is f.type, f"{f.name} must be of type {f.type.__name__}", repr(value))
            require(f.type not in (int, float) or low <= value <= high, f"{f.name} must lie in {low}..{high}", value)
            require(choices is None or value in choices, f"{f.name} must be one of {', '.join(choices or ())}", value)
        self.causal_num = self.group_size if self.causal_num == -1 else self.causal_num
        self.enc_mlp, self.dec_mlp = self.enc_mlp or 4 * self.enc_width, self.dec_mlp or 4 * self.dec_width
        self.dec_patch_size = self.dec_patch_size or self.patch_size
        self.ar_width, self.ar_depth, self.ar_heads = GPT_SIZES.get(
            self.gpt, (self.ar_width, self.ar_depth, self.ar_heads))
        self.ar_mlp = self.ar_mlp or 256 * math.ceil(int(8 * self.ar_width / 3) / 256)
        for name, unit in (("num_tokens", "group_size"), ("causal_num", "group_size"), ("image_size", "patch_size"),
                           ("image_size", "dec_patch_size"), ("enc_width", "enc_heads"), ("dec_width", "dec_heads"),
                           ("ar_width", "ar_heads")):
            value, of = getattr(self, name), getattr(self, unit)
            require(value % of == 0, f"{name} must be a multiple of {unit} {of}", value)
        require(not self.dynamic_prob or self.dec_patch_size % self.patch_size == 0, "for dynamic resolution "
                f"dec_patch_size must be a multiple of patch_size {self.patch_size}", self.dec_patch_size)
        self.enc_grid = self.enc_grid or self.image_size // self.patch_size
        self.dec_grid = self.dec_grid or self.image_size // self.dec_patch_size
        least = self.causal_num + self.group_size
        require(self.num_tokens >= least, f"num_tokens must be at least {least}: causal_num + group_size",
                self.num_tokens)
        for name, bound in (("min_size", "image_size"), ("noise_topk", "codebook_size")):
            value, most = getattr(self, name), getattr(self, bound)
            require(value <= most, f"{name} must not exceed {bound} {most}", value)
        require(self.shift < self.image_size, f"shift must be less than image_size {self.image_size}", self.shift)
        require(self.image_size >= 4 or not self.disc_weight + self.perceptual_weight,
                "a discriminator, or a perceptual loss, wants an image_size of at least 4", self.image_size)
        require(self.ar_width // self.ar_heads % 4 == 0, "ar_width / ar_heads must be a multiple of 4",
                f"{self.ar_width} / {self.ar_heads}")

EPOCH = 5004    # steps: 1,281,167 images in batches of 256
PAPER = {       # the paper's Section 4.1 and its authors' configuration files
    "data": "imagenet", "image_size": 256, "num_classes": 1000, "group_size": 8, "patch_size": 16,
    "codebook_size": 8192, "enc_width": 1152, "enc_depth": 12, "enc_heads": 16, "enc_mlp": 4304,
    "dec_width": 768, "dec_depth": 12, "dec_heads": 12, "tok_steps": 250 * EPOCH, "tok_batch": 256,
    "tok_lr": 1e-4, "tok_warmup": EPOCH, "tok_ema": 0.0, "revive_every": 0, "init_std": 0.0, "optimizer": "adamw",
    "enc_init": "siglip2", "align_weight": 1.0, "perceptual_weight": 1.0, "perceptual": "lpips",
    "disc": "dino", "disc_weight": 0.2, "disc_start": 40000, "ar_width": 1024, "ar_depth": 24, "ar_heads": 16,
    "ar_steps": 300 * EPOCH, "ar_batch": 256, "ar_lr": 1e-4, "ar_warmup": 15 * EPOCH, "ar_ema": 0.9999,
    "compile": True, "workers": 12, "save_every": EPOCH, "eval_samples": 50000, "inception": "auto"}
PRESETS = {
    "shapes": {},
    "cifar10": {
        "data": "cifar10", "patch_size": 4, "num_tokens": 128, "group_size": 8, "codebook_size": 4096, "enc_width": 384,
        "enc_depth": 6, "enc_heads": 6, "dec_width": 384, "dec_depth": 6, "dec_heads": 6, "tok_steps": 14000,
        "tok_batch": 256, "tok_lr": 1.5e-3, "tok_warmup": 500, "tok_ema": 0.999, "perceptual_weight": 0.05,
        "ar_width": 512, "ar_depth": 12, "ar_heads": 8, "ar_steps": 8000, "ar_batch": 512, "ar_lr": 1.5e-3,
        "ar_warmup": 400, "ar_ema": 0.999, "codebook_start": True, "shift": 2, "compile": True, "save_every": 1000,
        "guidance": 5.0, "eval_samples": 50000, "inception": "auto"},
    "imagenet-16": {**PAPER, "num_tokens": 128, "guidance": 1.45},
    "imagenet-32": {**PAPER, "num_tokens": 256, "guidance": 1.5},
    "imagenet-64": {**PAPER, "num_tokens": 512, "guidance": 1.32},
}

# == 3. Resolution mapping: the side of the image that n tokens are worth (paper, Section 3.2) =========================

def prefix_lengths(config):
    """The token counts that can be decoded: 1, 2, ..., c (drawn one by one), then whole groups up to N."""
    c, G, N = config.causal_num, config.group_size, config.num_tokens
    return [*range(1, c + 1), *range(c + G, N + 1, G)]

def resolution(config, n):
    """R(n), the side in pixels that the first n tokens explain: R(1) = 1, ..., R(N) = R.

    R(n) = R - (R - 1) / (N - 1)^alpha * (N - n)^alpha, truncated to an integer as in the authors' code. With alpha > 1
    it rises fast at first, more slowly later, where detail needs more tokens. For N = 8, R = 16, alpha = 1.5, p = 4:

        tokens n      1   2   3   4   5   6   7   8
        R(n)          1   4   6   9  11  13  15  16
        decoded at    4   4   8  12  12  16  16  16     rounded up to whole patches
    """
    R, N = config.image_size, config.num_tokens
    slope = (R - 1) / (N - 1) ** config.alpha
    return min(max(int(R - slope * (N - n) ** config.alpha), 1), R)

def decoder_size(config, n):
    """Side of the image decoded from n tokens: R(n) rounded up to whole patches (paper: to the nearest)."""
    return math.ceil(resolution(config, n) / config.dec_patch_size) * config.dec_patch_size

def resize(images, side):
    """(B, 3, S, S) -> (B, 3, side, side): area-averaged down, or bicubic up."""
    if side == images.shape[-1]:
        return images
    return F.interpolate(images, (side, side), mode="area" if side < images.shape[-1] else "bicubic")

def degrade(images, config, n):
    """The target for n tokens: (B, 3, R, R) in [-1, 1] -> (B, 3, S, S) with S = decoder_size(n).
    Area-averaged down to R(n), which removes the detail that n tokens need not show, then bicubic up to the decoder's
    size. The target of the first token is the mean colour, that of all N tokens the image itself."""
    return resize(resize(images, resolution(config, n)), decoder_size(config, n))

# == 4. The mask: bool, True = may attend; one rule for the encoder's queries and for the AR transformer ===============

def group_causal_mask(length, causal_num, group_size):
    """(T, T) bool: row i says which positions j position i may attend to.

    The first c positions (c a multiple of G) see themselves and those before; a later one sees everything up to
    the end of its own group, so that a group can be computed in one pass. For T = 6, c = 2, G = 2:

        0 | 1 . . . . .     the first c = 2: one by one
        1 | 1 1 . . . .
        2 | 1 1 1 1 . .     a group: both see each other, and all before
        3 | 1 1 1 1 . .
        4 | 1 1 1 1 1 1     the next group
        5 | 1 1 1 1 1 1
    """
    i, j = torch.arange(length)[:, None], torch.arange(length)[None]
    return torch.where(i < causal_num, j <= i, j // group_size <= i // group_size)

# == 5. Vision transformer: SigLIP 2's layers, for encoder and decoder =================================================

def split_heads(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)                                         # (B, h, T, D/h)

class Block(nn.Module):
    """Pre-norm transformer layer: attention, then an MLP with tanh-GELU."""
    def __init__(self, width, heads, mlp):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, mlp), nn.Linear(mlp, width)
        for weight in (*self.qkv.weight.chunk(3), self.out.weight, self.fc1.weight, self.fc2.weight):
            nn.init.xavier_uniform_(weight)
        for layer in (self.qkv, self.out, self.fc1, self.fc2):
            nn.init.zeros_(layer.bias)

    def project(self, x):
        """q, k and v of x (B, T, D), (B, h, T, D/h) each."""
        return tuple(split_heads(t, self.heads) for t in self.qkv(self.norm1(x)).chunk(3, dim=-1))

    def forward(self, x, others=None, mask=None):
        """x (B, T, D) attends to itself and to `others`, k and v of P other tokens; mask (T, P + T).
        Returns the new x, and k and v of its own T tokens."""
        q, k, v = self.project(x)
        own = k, v
        if others is not None:
            k, v = (torch.cat(pair, dim=2) for pair in zip(others, own, strict=True))           # (B, h, P + T, D/h)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate="tanh")), own

def patchify(images, p):
    """(B, 3, H, W) -> (B, P, p * p * 3): patches row by row; within each: row, column, channel."""
    x = images.unflatten(2, (-1, p)).unflatten(4, (-1, p))                                      # (B, 3, h, p, w, p)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

def unpatchify(x, p):
    """The inverse of patchify for square images."""
    side = math.isqrt(x.shape[1])
    x = x.unflatten(1, (side, side)).unflatten(3, (p, p, 3))                                    # (B, h, w, p, p, 3)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)

class ViT(nn.Module):
    """Layers, a final norm and a grid x grid table of position embeddings; given a patch side p, also a patch
    embedding, which the decoder does not need."""
    def __init__(self, width, depth, heads, mlp, grid, init_std, p=None):
        super().__init__()
        self.grid, self.p = grid, p
        if p:
            self.patch_embed = nn.Linear(3 * p * p, width)
        self.positions = nn.Parameter(init_std * torch.randn(grid * grid, width))
        self.blocks = nn.ModuleList(Block(width, heads, mlp) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def embed(self, images):
        """Patch + position embeddings: (B, 3, H, W) in [-1, 1] -> (B, P, D)."""
        rows, columns = images.shape[2] // self.p, images.shape[3] // self.p
        return self.patch_embed(patchify(images, self.p)) + self.position_grid(rows, columns)

    def position_grid(self, rows, columns):
        """Positions of rows x columns patches, resized from the table where sizes differ: (rows * columns, D)."""
        if rows == columns == self.grid:
            return self.positions
        table = self.positions.unflatten(0, (self.grid, self.grid)).permute(2, 0, 1)[None]      # (1, D, grid, grid)
        table = F.interpolate(table, (rows, columns), mode="bilinear", align_corners=False, antialias=True)
        return table[0].flatten(1).T

    def forward(self, x):
        """All layers, with full attention, and the norm: (B, T, D) -> (B, T, D)."""
        for block in self.blocks:
            x, _ = block(x)
        return self.norm(x)

# == 6. Vector quantiser: nearest neighbour on the unit sphere =========================================================

class Quantized(NamedTuple):
    vectors: torch.Tensor   # (B, T, C) codebook rows of unit length; their gradient goes straight to the latents
    codes: torch.Tensor     # (B, T) int64
    latents: torch.Tensor   # (B, T, C) what was quantised, at unit length
    error: torch.Tensor     # (B, T) codebook loss + beta * commitment loss, |e - z|^2 / C each

class Quantizer(nn.Module):
    """A latent becomes the nearest of V codebook rows, all at unit length. The choice has no gradient: the row's is
    passed to the latent instead ("straight through"), and the error pulls the row to the latent (codebook loss) and,
    weighted by beta, the latent to the row (commitment loss)."""
    WINDOW = 65536          # usage is averaged over about so many codes
    AT_ONCE = 2**24         # cosines in memory at once (64 MB): a large batch with 8,192 codes would need a GB

    def __init__(self, codebook_size, code_dim, commit_weight):
        super().__init__()
        self.commit_weight = commit_weight
        self.codebook = nn.Parameter(F.normalize(torch.randn(codebook_size, code_dim), dim=-1))
        self.register_buffer("counts", torch.zeros(codebook_size))

    def lookup(self, codes):
        return F.normalize(self.codebook[codes], dim=-1)                                        # (..., C)

    @torch.no_grad()
    def nearest(self, latents, k):
        """The k nearest codes of unit vectors (..., C), nearest first: (..., k).
        On the sphere |z - e|^2 = 2 - 2 z.e: the nearest code has the largest cosine."""
        found, codebook = [], F.normalize(self.codebook, dim=-1).T                              # (C, V)
        with torch.autocast(latents.device.type, enabled=False):    # bfloat16 would decide near ties at random
            for part in latents.flatten(0, -2).split(max(1, self.AT_ONCE // codebook.shape[1])):
                cosine = part @ codebook                                                        # (rows, V)
                found.append(cosine.argmax(-1, keepdim=True) if k == 1 else cosine.topk(k).indices)
        return torch.cat(found).unflatten(0, latents.shape[:-1])

    def forward(self, latents):
        """(B, T, C) -> Quantized, in float32 also under autocast."""
        with torch.autocast(latents.device.type, enabled=False):
            z = F.normalize(latents.float(), dim=-1)
            codes = self.nearest(z, 1)[..., 0]
            e = self.lookup(codes)
            error = (e - z.detach()).square().mean(-1) + self.commit_weight * (e.detach() - z).square().mean(-1)
            return Quantized(z + (e - z).detach(), codes, z, error)     # straight through: value e, gradient to z

    @torch.no_grad()
    def track(self, codes, machine):
        """Note which codes were used, on all processes; older uses fade out over WINDOW codes."""
        codes = codes.flatten()
        new = torch.zeros_like(self.counts).index_add_(0, codes, torch.ones_like(codes, dtype=torch.float))
        self.counts.mul_(max(1 - len(codes) * machine.world / self.WINDOW, 0)).add_(machine.total(new))

    @torch.no_grad()
    def revive(self, latents, key, machine):
        """Reset dead codes, hardly chosen of late, to random latents of the batch: a small codebook trained from
        scratch would otherwise use a few dozen codes, all on the side of the sphere where training began."""
        everyone = latents.new_zeros(len(latents), machine.world, *latents.shape[1:])
        everyone[:, machine.rank] = latents
        everyone = machine.total(everyone).flatten(0, -2)                                       # (all latents, C)
        chosen = everyone[(uniform(key, len(self.counts))[0] * len(everyone)).long()]           # (V, C)
        dead = (self.counts < 0.03 * self.counts.mean()) & chosen.isfinite().all(-1)
        self.codebook.copy_(torch.where(dead[:, None], chosen, self.codebook))

    def usage(self):
        """Share of the codes used lately, and perplexity exp(entropy): how many are in effective use."""
        p = self.counts / self.counts.sum().clamp(min=1)
        return (self.counts > 0.5).float().mean(), torch.special.entr(p).sum().exp()

# == 7. Tokenizer: encoder, self-correction, decoder (paper, Sections 3.1 to 3.3) ======================================

# Trained (section 15) on L = |pixels - degrade(image, n)|^2 + vq_loss for the pixels that the first n tokens decode to,
# clean and self-corrected; cifar10 adds a perceptual loss; the imagenet presets LPIPS, first-token alignment and the
# adversarial loss.

class Correction(NamedTuple):   # the rows of the drawing in Tokenizer.correct
    vectors: torch.Tensor   # (B, N, C) to be decoded
    shown: torch.Tensor     # (B, N) the same as codes: what the AR transformer is shown
    targets: torch.Tensor   # (B, N) codes: what it is to predict
    error: torch.Tensor     # (B, N) quantisation error of the tokens that were encoded again, 0 elsewhere
    redone: torch.Tensor    # (B, N) bool, True where a token was encoded again

class TokenizerOutput(NamedTuple):
    pixels: torch.Tensor    # (B or 2B, 3, S, S) the decoded prefix: clean sequences, then corrected ones
    vq_loss: torch.Tensor   # scalar: codebook and commitment loss
    codes: torch.Tensor     # (B, N) clean codes
    latents: torch.Tensor   # (B, N, C) what became clean codes, without gradient
    guess: torch.Tensor     # (B, teacher_width) SigLIP 2's feature as predicted by the first token; or None

def draw_noise(config, keys, prefix):
    """Choose what self-correction spoils in each image: keys (B,) -> start (B,), the first spoilt position, and ranks
    (B, G): which near code replaces each (0: itself). A start below c means this one token, any other a whole parallel
    group, but never the prefix's last, which nothing later could repair. (The last token of a prefix up to c may be
    hit, as in the authors' code.) None, None where nothing is to be spoilt."""
    G, c = config.group_size, config.causal_num
    span = prefix if prefix <= c else prefix - G
    if not config.correction or prefix == 1 or span == 0:
        return None, None
    u = uniform(fold(keys, 0), 1 + G)
    start = (u[:, 0] * span).long()
    return torch.where(start < c, start, start // G * G), (u[:, 1:] * config.noise_topk).long()

class Tokenizer(nn.Module):
    """Image <-> N codes, coarse to fine: the first n codes decode to the image at resolution R(n)."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        N, C, D, E = config.num_tokens, config.code_dim, config.enc_width, config.dec_width
        std = config.init_std or 0.02
        self.encoder = ViT(D, config.enc_depth, config.enc_heads, config.enc_mlp, config.enc_grid,
                           config.init_std or D**-0.5, config.patch_size)
        self.queries = nn.Parameter(std * torch.randn(1, N, D))           # query i asks the image for token i;
        self.retry_queries = nn.Parameter(std * torch.randn(1, N, D))     # asks again, given what went wrong before
        self.query_positions = nn.Parameter(std * torch.randn(1, N, D))
        self.to_latent = nn.Linear(D, C)
        self.to_query = nn.Linear(C, D)                                   # a given vector in the place of a query
        self.quantizer = Quantizer(config.codebook_size, C, config.commit_weight)
        self.vector_embed = nn.Linear(C, E)
        self.code_positions = nn.Parameter(std * torch.randn(1, N, E))
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, E))
        self.decoder = ViT(E, config.dec_depth, config.dec_heads, config.dec_mlp, config.dec_grid,
                           config.init_std or E**-0.5)
        self.to_pixels = nn.Linear(E, 3 * config.dec_patch_size**2)
        if config.align_weight:             # predicts SigLIP 2's feature of the image from the first token
            A, T = config.align_width, config.teacher_width
            self.align_head = nn.Sequential(nn.Linear(C, A), nn.SiLU(), nn.Linear(A, A), nn.SiLU(), nn.Linear(A, T))
        mask = group_causal_mask(N, config.causal_num, config.group_size)
        self.register_buffer("mask", mask, persistent=False)

    # -- Encoder. Patches never attend to queries, so that both passes of self-correction can share their k and v --

    def encode_patches(self, images):
        """(B, 3, H, W) in [-1, 1] -> k and v of the patches in each layer: all that queries read of them."""
        x, patches = self.encoder.embed(images), []                                             # (B, P, D)
        for block in self.encoder.blocks[:-1]:
            x, kv = block(x)
            patches.append(kv)
        return [*patches, self.encoder.blocks[-1].project(x)[1:]]   # no query reads patches after the last layer

    def encode_queries(self, queries, patches):
        """Queries (B, T, D) see all patches and the queries that the mask allows -> latents (B, T, C)."""
        T, P = queries.shape[1], patches[0][0].shape[2]
        x = queries + self.query_positions[:, :T]
        mask = torch.cat([self.mask.new_ones(T, P), self.mask[:T, :T]], dim=1)                  # (T, P + T)
        for block, kv in zip(self.encoder.blocks, patches, strict=True):
            x, _ = block(x, kv, mask)
        return self.to_latent(self.encoder.norm(x))

    def quantize(self, patches, count=None):
        """The clean pass: all learned queries, or the first `count` -> Quantized."""
        queries = self.queries[:, :count].expand(len(patches[0][0]), -1, -1)                    # (B, N, D)
        return self.quantizer(self.encode_queries(queries, patches))

    # -- Self-correction --

    def correct(self, patches, clean, start, ranks):
        """Spoil one group of codes and let the encoder compensate in those after it (paper, Section 3.3). So
        trained, near codes also come to decode alike, and a wrong one costs less, which helps most in small (README).

        start (B,) and ranks (B, G) as from draw_noise. With N = 8, G = c = 2 and start = 2:

            token      0   1   2   3   4   5   6   7
            clean      a0  a1  a2  a3  a4  a5  a6  a7      the first pass
            queries    a0  a1  x2  x3  q4  q5  q6  q7      given codes (x: spoilt), then "retry" queries
            gradient    -   -   -   -   +   +   +   +      given codes are constants
            vectors    a0  a1  x2  x3  b4  b5  b6  b7      must still decode to the image: b repairs x
            shown      a0  a1  x2  x3  b4  b5  b6  b7      what a sampler may have drawn so far ...
            targets    a0  a1  a2  a3  b4  b5  b6  b7      ... and what it should have drawn, or should draw now
        """
        c, G, N = self.config.causal_num, self.config.group_size, clean.codes.shape[1]
        position, start = torch.arange(N, device=start.device)[None], start[:, None]            # (1, N), (B, 1)
        offset, length = position - start, torch.where(start < c, 1, G)                         # (B, N), (B, 1)
        spoilt, redone = (offset >= 0) & (offset < length), offset >= length                    # (B, N) each

        # The G latents from start on and codes near them (below c only the first of these is used):
        latents = clean.latents.take_along_dim((start + position[:, :G])[..., None], 1)         # (B, G, C)
        near = self.quantizer.nearest(latents, self.config.noise_topk)                          # (B, G, noise_topk)
        wrong = near.take_along_dim(ranks[..., None], 2)[..., 0]                                # (B, G)
        codes = torch.where(spoilt, wrong.gather(1, offset.clamp(0, G - 1)), clean.codes)

        given = self.quantizer.lookup(codes).detach()                                           # (B, N, C), no gradient
        again = self.quantizer(self.encode_queries(
            torch.where(redone[..., None], self.retry_queries[:, :N], self.to_query(given)), patches))
        return Correction(vectors=torch.where(redone[..., None], again.vectors, given),
                          shown=torch.where(redone, again.codes, codes),
                          targets=torch.where(redone, again.codes, clean.codes),
                          error=again.error * redone, redone=redone)

    # -- Decoder --

    def decode_vectors(self, vectors, size):
        """Vectors (B, n, C) of codes -> pixels (B, 3, size, size), nominally in [-1, 1]. A canvas, mask tokens
        with positions, and the vectors all attend to each other; the canvas is read out as patches."""
        n, side = vectors.shape[1], size // self.config.dec_patch_size
        canvas = (self.mask_token + self.decoder.position_grid(side, side)).expand(len(vectors), -1, -1)
        x = torch.cat([canvas, self.vector_embed(vectors) + self.code_positions[:, :n]], dim=1) # (B, side^2 + n, E)
        x = self.to_pixels(self.decoder(x)[:, :side * side])
        return unpatchify(x, self.config.dec_patch_size).float()

    # -- What the rest of the program calls --

    def forward(self, images, prefix, start=None, ranks=None, count=None):
        """A training pass: encode N tokens [the first `count`], decode the first `prefix` of them; with start (B,) and
        ranks (B, G) also with a group spoilt and repaired, see correct()."""
        patches = self.encode_patches(images)
        clean = self.quantize(patches, count)
        vectors, vq_loss = clean.vectors, clean.error.mean()
        if start is not None:
            fixed = self.correct(patches, clean, start, ranks)
            vectors = torch.cat([vectors, fixed.vectors])                                       # (2B, N, C)
            # The mean over all encoded tokens: N in the first pass, those after the spoilt ones in the second.
            tokens = clean.codes.shape[1] + fixed.redone.sum(1)
            vq_loss = ((clean.error.sum(1) + fixed.error.sum(1)) / tokens).mean()
        pixels = self.decode_vectors(vectors[:, :prefix], decoder_size(self.config, prefix))
        guess = self.align_head(clean.vectors[:, 0]) if self.config.align_weight else None
        return TokenizerOutput(pixels, vq_loss, clean.codes, clean.latents.detach(), guess)

    @torch.no_grad()
    def encode(self, images):
        """(B, 3, H, W) float in [-1, 1], sides multiples of p -> codes (B, N) int64. Raises Refused."""
        check(images, "images", ("B", 3, "H", "W"))
        sides, p = tuple(images.shape[2:]), self.config.patch_size
        require(sides[0] % p == sides[1] % p == 0, f"sides of images must be multiples of {p}", sides)
        return self.quantize(self.encode_patches(images)).codes

    @torch.no_grad()
    def decode(self, codes, size=None):
        """Codes (B, n), n one of prefix_lengths -> (B, 3, S, S), nominally in [-1, 1]; S = size or decoder_size(n).
        Raises Refused."""
        check(codes, "codes", ("B", "n"), self.config.codebook_size - 1)
        allowed, p = prefix_lengths(self.config), self.config.dec_patch_size
        require(codes.shape[1] in allowed, f"codes must be (B, n), n in {allowed}", tuple(codes.shape))
        size = decoder_size(self.config, codes.shape[1]) if size is None else size
        require(type(size) is int and size > 0 == size % p, f"size must be a multiple of the patch size {p}", size)
        return self.decode_vectors(self.quantizer.lookup(codes.long()), size)

    @torch.no_grad()
    def triples(self, images, keys):
        """Codes for the AR stage, as in Correction: (B, 3, R, R), keys (B,) -> (B, 3, N) clean, shown, targets."""
        patches = self.encode_patches(images)
        clean = self.quantize(patches)
        start, ranks = draw_noise(self.config, keys, self.config.num_tokens)
        if start is None:
            return torch.stack([clean.codes] * 3, dim=1)
        fixed = self.correct(patches, clean, start, ranks)
        return torch.stack([clean.codes, fixed.shown, fixed.targets], dim=1)

# == 8. Adversarial loss (optional): a discriminator learns to see what decoded images lack ============================

def diff_augment(images, key, keys, weak):
    """DiffAugment (arXiv 2006.10738): images (B, 3, S, S) -> the same shape, differentiable. Colour, translation by up
    to S/8, and cutout, drawn for each image from keys (B,). weak: each of the three with chance 1/2, one draw for the
    batch, from key (1,), and a hole of 0.2 S; else all three, and a hole of 0.5 S."""
    S, use = images.shape[-1], uniform(key, 3)[0] < (0.5 if weak else 1.0)              # (3,) bool
    rows, columns = torch.arange(S, device=key.device)[:, None], torch.arange(S, device=key.device)
    u = uniform(keys, 7).T[..., None, None, None]                                       # (7, B, 1, 1, 1)

    x = images + u[0] - 0.5                                                             # brightness
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * 2 * u[1]                                                    # saturation
    mean = x.mean((1, 2, 3), keepdim=True)
    images = torch.where(use[0], mean + (x - mean) * (u[2] + 0.5), images)              # contrast

    most = int(S / 8 + 0.5)
    down, right = (u[3:5] * (2 * most + 1)).long()                                      # (B, 1, 1, 1)
    wider = F.pad(images, [most] * 4)
    moved = wider.take_along_dim(rows + down, 2).take_along_dim(columns + right, 3)     # (B, 3, S, S)
    images = torch.where(use[1], moved, images)

    side = int(S * (0.2 if weak else 0.5) + 0.5)
    top, left = (u[5:7] * (S + 1 - side % 2)).long() - side // 2                        # may stick out
    hole = (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + side) # (B, 1, S, S)
    return torch.where(use[2], images * ~hole, images)

class Discriminator(nn.Module):
    """Real or decoded? What both discriminators share; each adds its own score(images, key). They see images
    augmented: unaugmented, the small one was soon evaded by a faint grid over all images."""
    LECAM, DECAY = 0.001, 0.999
    RATE, BETAS = None, (0.9, 0.95)                     # of its AdamW; a rate of None: the tokenizer's
    consistency = 0.0           # weight of the loss on score changes under strong augmentation

    def __init__(self):
        super().__init__()
        self.register_buffer("anchors", torch.zeros(2))     # running means of real and fake scores

    def scores(self, images, key, keys, weak=True):
        """Scores in float32 of images (B, 3, S, S); key (1,) is the batch's, keys (B,) are the images'."""
        keys = fold(keys, 5)                                # (LPIPS's dropout has 0 to 4)
        return self.score(diff_augment(images, fold(key, 0), keys, weak), fold(key, 1)).float()

    def adversarial_loss(self, fake, target, key, keys):
        """What the decoder is to lower: minus the mean score of what it made, fake (B, 3, S, S), of the target."""
        return -self.scores(fake, key, keys).mean()

    def forward(self, real, fake, key, keys):
        """Scores of real and fake images weakly augmented and, where consistency is wanted, strongly."""
        views = [(real, 0, True), (fake, 1, True), (real, 2, False), (fake, 3, False)]
        return [self.scores(x, fold(key, i), fold(keys, i), weak) for x, i, weak in views if weak or self.consistency]

    def loss(self, scores, weight, machine, share=1.0):
        """Hinge, plus LeCam, which keeps real scores from running far above the mean fake one, and vice versa. As in
        the authors' code, disc_weight scales both, and the decoder's loss, but not the consistency.
        scores: from forward(), of this `share` of the step's batch."""
        real, fake, *strong = scores
        means = machine.total(torch.stack([real.mean(), fake.mean()]).detach()) / machine.world
        self.anchors.lerp_(torch.where(means.isfinite(), means, self.anchors), share * (1 - self.DECAY))
        hinge = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
        lecam = F.relu(real - self.anchors[1]).square().mean() + F.relu(self.anchors[0] - fake).square().mean()
        same = F.mse_loss(torch.cat([real, fake]), torch.cat(strong)) if strong else 0
        return share * (weight * (hinge + self.LECAM * lecam) + self.consistency * same)

class PatchDiscriminator(Discriminator):
    """Without a download: a convolutional network that scores patches of 26 x 26 pixels."""
    RATE, BETAS = 1e-3, (0.5, 0.95)     # slower, or with a momentum of 0.9, it stayed at chance: the decoder evades it

    def __init__(self, image_size, width=64):
        super().__init__()
        self.image_size = image_size
        norm, act = nn.utils.parametrizations.spectral_norm, nn.LeakyReLU(0.2)
        self.net = nn.Sequential(norm(nn.Conv2d(3, width, 4, 2, 1)), act,
                                 norm(nn.Conv2d(width, 2 * width, 4, 2, 1)), act,
                                 norm(nn.Conv2d(2 * width, 4 * width, 3, 1, 1)), act,
                                 norm(nn.Conv2d(4 * width, 1, 3, 1, 1)))

    def score(self, images, key):
        """(B, 3, S, S) in [-1, 1] -> scores (B, 1, s, s). Images from short prefixes are enlarged first."""
        if images.shape[-1] < self.image_size:
            images = F.interpolate(images, (self.image_size,) * 2, mode="bilinear", align_corners=False)
        return self.net(images)

    def adversarial_loss(self, fake, target, key, keys):
        """Minus the mean score; its gradient at the pixels is scaled, image by image, to the length of the pixel
        loss's: a fixed scale drowned that, where LPIPS is not there to resist."""
        loss = -self.scores(fake, key, keys).mean()
        push, = torch.autograd.grad(loss, fake)                                                 # (B, 3, S, S)
        pull = 2 * (fake - target).detach() / fake.numel()                                      # (B, 3, S, S)
        pulled, pushed = (gradient.flatten(1).norm(dim=1) for gradient in (pull, push))         # (B,) each
        given = push * (pulled / pushed.clamp(min=1e-12))[:, None, None, None]                  # (B, 3, S, S)
        return loss.detach() + (given * (fake - fake.detach())).sum()       # value loss, gradient given

# == 9. AR transformer: the first group token by token, every later group in one pass (paper, Section 3.3) =============

# Position p of the sequence predicts code p. What it is given, for N = 8, G = c = 2:
#
#     position    0      1      2      3      4      5      6      7
#     input     class  code 0 code 1 special code 2 code 3 code 4 code 5
#     predicts  code 0 code 1 code 2 code 3 code 4 code 5 code 6 code 7
#     pass        1      2    '---- 3 ----' '---- 4 ----' '---- 5 ----'       G + N/G - 1 = 5 passes
#
# The first parallel group has one preceding code as input; G - 1 learned special tokens (the paper's mask tokens) fill
# its other positions. Codes of one pass are sampled independently, each from the right distribution given all before,
# but not given each other. Where the detail is nearly determined, no harm is done. Elsewhere it is: if (1, 2) and
# (2, 1) are equally likely, independent draws give (1, 1) or (2, 2) half of the time. Hence the first group, which
# fixes the layout, is sampled one by one, and later groups have learned to make up for errors (self-correction).

def rotary_table(config):
    """Two-dimensional RoPE: (cos, sin), (N, D/h/2, 2); half of the pairs rotate with the group, half with the place in
    it. Position i + 1 has group i // G, place i % G (the mask groups it by (i + 1) // G: off by one, as in the authors'
    code). Row 0, the class, is all zeros, not (1, 0): its query and key vanish in every layer, so that every position
    attends to it with logit 0."""
    quarter = config.ar_width // config.ar_heads // 4
    frequency = 10000.0 ** -(torch.arange(quarter) / quarter)
    i = torch.arange(config.num_tokens - 1)[:, None]
    angle = torch.cat([i // config.group_size * frequency, i % config.group_size * frequency], dim=1)
    return F.pad(torch.stack([angle.cos(), angle.sin()], dim=-1), (0, 0, 0, 0, 1, 0))

def rotate(x, table):
    """Turn the pairs (2i, 2i + 1) of x (B, h, T, D/h) by the angles of table (T, D/h/2, 2), in float32."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)                                          # (B, h, T, D/h/2)
    cos, sin = table.unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).type_as(x)

class ARBlock(nn.Module):
    """Llama layer without biases: RMSNorm, rotary attention, RMSNorm, SwiGLU."""
    def __init__(self, config):
        super().__init__()
        D, hidden = config.ar_width, config.ar_mlp
        self.heads, self.rate = config.ar_heads, config.dropout
        self.norm1, self.norm2 = nn.RMSNorm(D, eps=1e-5), nn.RMSNorm(D, eps=1e-5)
        self.qkv, self.out = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
        self.w1, self.w3 = nn.Linear(D, hidden, bias=False), nn.Linear(D, hidden, bias=False)
        self.w2 = nn.Linear(hidden, D, bias=False)

    def forward(self, x, rotary, mask, cache=None, positions=None, keys=None):
        """x (B, T, D), with angles rotary (T, D/h/2, 2), attends to itself as mask (T, T) allows; or writes its keys
        and values into a cache (2, B, h, N, D/h) at `positions` (T,) and attends to that, with mask (T, N)."""
        q, k, v = (split_heads(t, self.heads) for t in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        q, k = rotate(q, rotary), rotate(k, rotary)
        if cache is not None:
            k, v = cache.index_copy_(3, positions, torch.stack([k, v]).type_as(cache))      # (B, h, N, D/h) each
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + dropout(self.out(y.transpose(1, 2).flatten(2)), self.rate, keys, 0)
        h = self.norm2(x)
        return x + dropout(self.w2(F.silu(self.w1(h)) * self.w3(h)), self.rate, keys, 1)

class ARTransformer(nn.Module):
    """Predicts the N codes of an image of a given class, coarse to fine."""
    def __init__(self, config):
        super().__init__()
        self.config, self.cache = config, [None]
        self.dropout = dropout              # an attribute, which wrap() can compile
        D, V = config.ar_width, config.codebook_size
        self.class_embed = nn.Embedding(config.num_classes + 1, D)          # the last row is the null class
        self.code_embed = nn.Embedding(V, D)
        self.blocks = nn.ModuleList(ARBlock(config) for _ in range(config.ar_depth))
        self.norm = nn.RMSNorm(D, eps=1e-5)
        self.output = nn.Linear(D, V, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.output.weight)                                  # so that the first loss is ln V
        self.specials = nn.Parameter(torch.randn(config.group_size - 1, D))  # std 1, as in the published models
        self.register_buffer("rotary", rotary_table(config), persistent=False)
        mask = group_causal_mask(config.num_tokens, config.causal_num, config.group_size)
        self.register_buffer("mask", mask, persistent=False)

    @torch.no_grad()
    def start_from(self, codebook):
        """Before training, unlike the authors: each code's embedding and its row of the head become two random linear
        maps of its unit vector in codebook (V, C). So codes that look alike start alike. Otherwise that is learned code
        by code, and each is rare."""
        D = self.code_embed.embedding_dim
        for table, std in ((self.code_embed, 1.0), (self.output, D**-0.5)):                 # (logits of std 1)
            table.weight.copy_(std * codebook @ torch.randn(codebook.shape[1], D).to(codebook.device))

    def embed(self, labels, codes):
        """The inputs drawn above, as far as k codes go: labels (B,), codes (B, k) -> (B, T, D) with T = 1 + k; or, from
        k = c on, where the specials come in, G + k."""
        c = self.config.causal_num
        parts = [self.class_embed(labels)[:, None], self.code_embed(codes[:, :c])]
        if codes.shape[1] >= c:
            parts += [self.specials.expand(len(codes), -1, -1), self.code_embed(codes[:, c:])]
        return torch.cat(parts, dim=1)

    def run(self, x, keys=None):
        """Layers and head: x (B, T, D), positions 0..T-1, under the causal mask -> logits (B, T, V) float32."""
        T = x.shape[1]
        for i, block in enumerate(self.blocks):
            x = block(x, self.rotary[:T], self.mask[:T, :T], keys=None if keys is None else fold(keys, i))
        return self.output(self.norm(x)).float()

    def step(self, x, positions, cache):
        """A pass of generate(): inputs x (B, T, D) at `positions` (T,), one or a group, attend to the cache as the mask
        allows -> logits (B, T, V) float32. No shape depends on how far we are, so that on a GPU two compiled graphs,
        for one position and for a group, serve all passes."""
        rotary, mask = self.rotary[positions], self.mask[positions]                         # (T, D/h/2, 2), (T, N)
        for block, layer_cache in zip(self.blocks, cache, strict=True):
            x = block(x, rotary, mask, layer_cache, positions)
        return self.output(self.norm(x)).float()

    def new_cache(self, batch):
        """The KV cache, for each layer (2, B, h, N, D/h). Memory is reused where shapes agree, as CUDA graphs require;
        the mask hides what an earlier batch left there."""
        like, c = self.output.weight, self.config
        shape = 2, batch, c.ar_heads, c.num_tokens, c.ar_width // c.ar_heads
        old = self.cache[0]
        if old is None or (old.shape, old.dtype, old.device) != (shape, like.dtype, like.device):
            self.cache = [like.new_zeros(shape) for _ in self.blocks]
            for layer in self.cache:
                torch._dynamo.mark_static_address(layer)
        return self.cache

    def forward(self, labels, codes, keys=None):
        """labels (B,) in 0..num_classes (the last is "no class"), codes (B, N) -> logits (B, N, V) float32.
        Position i predicts code i, from the class and from codes of earlier groups (for i < c: all earlier codes).
        keys (B,): one a sample, for dropout in training; None: no dropout. Raises Refused."""
        N, G, K = self.config.num_tokens, self.config.group_size, self.config.num_classes
        if keys is None:                        # in training this would make a GPU wait
            check(codes, "codes", ("B", N), self.config.codebook_size - 1)
            check(labels, "labels", (len(codes),), K)
            labels, codes = labels.long(), codes.long()
        else:
            hidden = uniform(fold(keys, len(self.blocks)), 1)[:, 0] < self.config.class_dropout
            labels = torch.where(hidden, K, labels)
        x = self.dropout(self.embed(labels, codes[:, :N - G]), self.config.dropout, keys, len(self.blocks) + 1)
        return self.run(x, keys=keys)

# == 10. Generation: c + (N - c)/G passes (for c = G: G + N/G - 1), each over its new positions only ===================

def decoding_spans(config, num_tokens):
    """The positions of each pass, [(0, 1), ..., (c - 1, c), (c, c + G), (c + G, c + 2G), ...], up to num_tokens."""
    return list(itertools.pairwise([0, *(n for n in prefix_lengths(config) if n <= num_tokens)]))

def guidance_scale(config, start, guidance, schedule):
    """Scale of classifier-free guidance in the pass that begins at position `start`: 0 gives the logits without the
    class, 1 those with it, more goes beyond. constant: the same for all. linear, the authors' "gradual": full for the
    first c codes, then for group i of K = N/G: guidance * (K - i + 1) / (K + 1)."""
    if schedule == "constant" or start < config.causal_num:
        return guidance
    K = config.num_tokens // config.group_size
    return guidance * (K - start // config.group_size + 1) / (K + 1)

def filter_logits(logits, top_k=0, top_p=1.0):
    """Set to -inf all codes below the k-th best (ties stay), then all after the one with which top_p is reached."""
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[..., -1:], -math.inf)
    if top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True)
        p = ordered.softmax(dim=-1)
        surplus = p.cumsum(dim=-1) - p > top_p                              # those before it reach top_p already
        logits = logits.masked_fill(torch.zeros_like(surplus).scatter(-1, index, surplus), -math.inf)
    return logits

def draw_codes(logits, u, temperature=1.0, top_k=0, top_p=1.0):
    """Codes (B, T) from logits (B, T, V) and uniform u (B, T), each on its own. Temperature 0, or so low that
    logits might overflow: argmax.
    Inverse transform sampling: the first code at which the cumulative probability exceeds u."""
    if temperature < 1e-6:
        return logits.argmax(dim=-1)
    p = filter_logits(logits / temperature, top_k, top_p).softmax(dim=-1).double().cumsum(dim=-1)
    threshold = (u.double() + 2**-25)[..., None] * p[..., -1:]              # u + 2^-25 lies strictly inside (0, 1)
    return torch.searchsorted(p, threshold, right=True)[..., 0]

@torch.no_grad()
def generate(model, labels, guidance=1.0, schedule="constant", temperature=1.0, top_k=0, top_p=1.0, seeds=None,
             num_tokens=None, slow=False):
    """Draw images: labels (B,) -> codes (B, N) int64; or only the first num_tokens: a smaller image, sooner.
    seeds: an integer for each image [fresh ones from torch's generator]. What image i becomes depends on its label and
    seed, not on its batch. slow=True recomputes every position in every pass, as the authors' code does: the
    reference that the cache is tested against. Raises Refused."""
    config, device = model.config, model.output.weight.device
    replace(config, guidance=guidance, schedule=schedule, temperature=temperature, top_k=top_k, top_p=top_p)  # (checks)
    check(labels, "labels", ("B",), config.num_classes)
    num_tokens, allowed = config.num_tokens if num_tokens is None else num_tokens, prefix_lengths(config)
    require(type(num_tokens) is int and num_tokens in allowed, f"num_tokens must be one of {allowed}", num_tokens)
    with blame("seeds must be integers, one a label"):
        seeds = torch.randint(2**62, (len(labels),)) if seeds is None else torch.as_tensor(seeds)
    check(seeds, "seeds", (len(labels),), 2**63 - 1)
    u = uniform(fold(seeds.to(device, torch.int64), 0), config.num_tokens)                      # (B, N)
    labels, guided = labels.to(device, torch.int64), guidance != 1 or schedule == "linear"
    if guided:                                              # both halves in one batch: with the class, without it
        labels = torch.cat([labels, torch.full_like(labels, config.num_classes)])               # (2B,)
    codes = labels.new_zeros(len(labels), num_tokens, dtype=torch.int64)
    cache = None if slow else model.new_cache(len(labels))
    for start, end in decoding_spans(config, num_tokens):
        x = model.embed(labels, codes[:, :start])                                               # (2B, end, D)
        if slow:
            logits = model.run(x)[:, start:]                                                    # (2B, end - start, V)
        else:
            logits = model.step(x[:, start:].contiguous(), torch.arange(start, end, device=device), cache)
        if guided:
            conditional, free = logits.chunk(2)
            logits = free + (conditional - free) * guidance_scale(config, start, guidance, schedule)
        drawn = draw_codes(logits, u[:, start:end], temperature, top_k, top_p)
        codes[:, start:end] = drawn.repeat(len(codes) // len(drawn), 1)
    return codes[:len(u)]

PACKED_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None)      # None where torch was built without oneDNN

def pack_linear(*modules):
    """For speed alone, on a CPU: repack the present weights of linear layers in oneDNN's blocked order. With the few
    rows of a pass, most of the time goes into reading weights, and that becomes much faster."""
    if torch.backends.mkldnn.is_available() and PACKED_LINEAR:
        for layer in (m for module in modules for m in module.modules() if type(m) is nn.Linear):
            packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
            layer.forward = functools.partial(PACKED_LINEAR, W=packed, B=layer.bias, attr="none", scalars=[],
                                              algorithm="")

def prepare_sampling(tokenizer, model, machine, compiled):
    """For speed alone, once training is over: cast the model to the compute dtype; on a CPU, pack weights; on a GPU, if
    `compiled`, make CUDA graphs of a pass of generate() and of the decoder, hundreds of small kernels that would take
    longer to launch than to run."""
    for p in model.parameters():                        # (the table of angles stays float32)
        p.data = p.data.to(machine.dtype)
    if machine.device.type == "cpu" and machine.dtype == torch.float32:
        pack_linear(model, tokenizer.decoder)
    elif machine.device.type == "cuda" and compiled:
        graph = functools.partial(torch.compile, mode="reduce-overhead", dynamic=False)
        model.step, tokenizer.decode_vectors = graph(model.step), graph(tokenizer.decode_vectors)

# == 11. Published weights: the authors' checkpoints, and the networks that training at the paper's scale leans on =====

CACHE = Path(torch.hub.get_dir()) / "detailflow"    # downloads; the environment variable TORCH_HOME moves it
INCEPTION, VGG, LPIPS_LINEAR = "pt_inception-2015-12-05-6726825d.pth", "vgg16-397923af.pth", "lpips-vgg.pth"
DINO, SIGLIP = "dino_deitsmall16_pretrain.pth", "siglip2-so400m-patch16-naflex.safetensors"
WEIGHTS = {     # file: (address, SHA-256, or None where nobody publishes one: then names and shapes are the check)
    INCEPTION: ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/" + INCEPTION,
                "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"),
    VGG: ("https://download.pytorch.org/models/" + VGG,
          "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"),
    LPIPS_LINEAR: ("https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/"
                   "082bb24f84c091ea94de2867d34c4544f68e0963/lpips/weights/v0.1/vgg.pth",
                   "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"),
    DINO: ("https://dl.fbaipublicfiles.com/dino/dino_deitsmall16_pretrain/" + DINO, None),
    SIGLIP: ("https://huggingface.co/google/siglip2-so400m-patch16-naflex/resolve/main/model.safetensors", None)}

def published(name, folder=""):
    """Path of a published file in `folder` [CACHE], fetched when it is not there: it gets its name only when it is
    whole and its hash is right. Raises Refused, which says where to put it by hand."""
    require(name in WEIGHTS, f"published files are {', '.join(WEIGHTS)}", repr(name))
    (url, sha256), path, digest = WEIGHTS[name], Path(folder or CACHE) / name, hashlib.sha256()
    if path.exists():
        return path
    aside = path.with_name(f"{name}.{os.getpid()}.tmp")
    request = urllib.request.Request(url, headers={"User-Agent": "detailflow"})
    with blame(f"{url} can't be downloaded", f": put it at {path}, or name a folder that has it: --weights FOLDER"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with urllib.request.urlopen(request, timeout=30) as source, open(aside, "wb") as file:
                length = int(source.headers.get("Content-Length", 0))
                blocks = iter(functools.partial(source.read, 2**20), b"")
                for block in tqdm(blocks, name, math.ceil(length / 2**20) or None, unit="MB"):
                    file.write(block)
                    digest.update(block)
                require(length in (0, file.tell()), f"{length} bytes were announced", file.tell())
            require(sha256 in (None, digest.hexdigest()), f"its SHA-256 must be {sha256}", digest.hexdigest())
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
    return path

# Each table turns our names into theirs, first pair to last. This way round, what a file lacks can be named
# as it is called there. "*" stands for q, k and v, which we keep in one matrix.
SIGLIP_NAMES = [
    (r"\bpatch_embed\.", "embeddings.patch_embedding."), (r"\bblocks\.", "encoder.layers."),
    (r"\bpositions$", "embeddings.position_embedding.weight"), (r"\bnorm\.", "post_layernorm."),
    (r"\bnorm([12])\.", r"layer_norm\1."), (r"\bfc([12])\.", r"mlp.fc\1."),
    (r"\bqkv\.", "self_attn.*_proj."), (r"\bout\.", "self_attn.out_proj.")]
TOKENIZER_NAMES = [
    (r"^(encoder|decoder)\.", r"\1.visual_model."), (r"^queries$", "encoder.latent_tokens"),
    (r"^retry_queries$", "encoder.refined_tokens"), (r"^query_positions$", "encoder.latent_pos_embed"),
    (r"^code_positions$", "decoder.latent_pos_embed"), (r"^mask_token$", "decoder.mask_token"),
    (r"^quantizer\.codebook$", "quantize.embedding.weight"), (r"^to_latent\.", "quant_conv."),
    (r"^to_query\.", "refine_conv."), (r"^vector_embed\.", "post_quant_conv."),
    (r"^to_pixels\.", "decoder.to_pixel.model."), (r"^align_head\.", "global_token_proj."), *SIGLIP_NAMES]
AR_NAMES = [
    (r"^class_embed\.", "cls_embedding.embedding_table."), (r"^code_embed\.", "tok_embeddings."),
    (r"^specials$", "spe_tok_embeddings.special_embeddings.weight"), (r"^blocks\.", "layers."),
    (r"\bqkv\.", "attention.wqkv."), (r"\bout\.", "attention.wo."), (r"\bw([123])\.", r"feed_forward.w\1."),
    (r"\bnorm1\.", "attention_norm."), (r"\bnorm2\.", "ffn_norm.")]
DINO_NAMES = [
    (r"^patch_embed\.", "patch_embed.proj."), (r"^class_token$", "cls_token"), (r"^positions$", "pos_embed"),
    (r"\bqkv\.", "attn.qkv."), (r"\bout\.", "attn.proj."), (r"\bfc([12])\.", r"mlp.fc\1.")]

def fill(module, path, tensors, names, ignore="$"):
    """Give a module, frozen and for evaluation, a file's tensors. What begins there with the pattern `ignore` is left
    alone on both sides. Raises Refused, which says what is missing, misshapen or left over in the file."""
    parts = {}
    for name, own in module.state_dict().items():
        theirs = functools.reduce(lambda text, pair: re.sub(*pair, text), names, name)
        letters = "qkv" if "*" in theirs else "-"
        parts |= zip([theirs.replace("*", letter) for letter in letters], own.chunk(len(letters)), strict=True)
    found, wanted = ({name: tuple(getattr(t, "shape", ())) for name, t in side.items()
                      if not re.match(ignore, str(name))} for side in (tensors, parts))
    faults = [f"{name} is {found.get(name, 'missing')}, not {wanted.get(name, 'expected')}"
              for name in wanted | found if wanted.get(name) != found.get(name)]
    require(not faults, f"{path} must fit a {type(module).__name__}", "; ".join(faults[:8]))
    for name in wanted:
        parts[name].copy_(tensors[name])
    return module.eval().requires_grad_(False)

class Inert:
    """Stands for the classes and functions that a foreign file names: accepts whatever unpickling does."""
    __init__ = __call__ = __setstate__ = __setitem__ = append = extend = add = lambda *args, **kwargs: None

KNOWN = {("collections", "OrderedDict"): OrderedDict, ("__builtin__", "set"): set, ("builtins", "set"): set,
         ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
         ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter}

class InertUnpickler(pickle.Unpickler):
    """Rebuilds tensors and plain containers; all else that a pickle would make, or run, becomes Inert."""
    def find_class(self, module, name):
        known = KNOWN.get((module, name), Inert)
        # A pickle can set attributes of a function that it is given: let that be a new one, not torch's own.
        return known if isinstance(known, type) else lambda *args: known(*args)

def read_foreign(path):
    """The dict in a torch.save file that weights_only=True may refuse; nothing in it is run. Raises Refused.
    Its tensors are memory-mapped where the format allows it: copy what is to outlive the file."""
    inert = types.SimpleNamespace(__name__="inert", Unpickler=InertUnpickler,
                                  load=lambda file, **options: InertUnpickler(file, **options).load())
    with blame(f"{path} is not a file of weights"):
        archive = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else []
        if any(name.endswith("constants.pkl") for name in archive):
            raise TypeError("TorchScript, which torch.load would compile")
        state = torch.load(path, "cpu", inert, weights_only=False, mmap=bool(archive))
        if not isinstance(state, dict):
            raise TypeError("no dict of tensors")
        return state

def read_safetensors(path, prefix=""):
    """The tensors of a safetensors file whose names begin with prefix, by the rest of them, memory-mapped.
    The format: the length of the header, 8 bytes; the header, JSON; the data. Raises Refused."""
    dtypes, tensors = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}, {}
    with blame(f"{path} is not a whole safetensors file"):
        data = np.memmap(path, np.uint8, "c")                   # c: writes would stay in memory
        start = 8 + int.from_bytes(data[:8].tobytes(), "little")
        header = json.loads(data[8:start].tobytes())
        header.pop("__metadata__", None)
        end = start + max(about["data_offsets"][1] for about in header.values())
        require(end == len(data), f"its header speaks of {end} bytes", len(data))
        for name, about in header.items():
            if name.startswith(prefix):
                flat = torch.from_numpy(data[start:][slice(*about["data_offsets"])]).view(dtypes[about["dtype"]])
                tensors[name.removeprefix(prefix)] = flat.view(about["shape"])
    return tensors

# -- The authors' checkpoints --

def tower_sizes(tensors, stem=""):
    """What the tensors of the SigLIP 2 tower whose names begin with `stem` say of it."""
    patches, width = tensors[f"{stem}embeddings.position_embedding.weight"].shape
    hidden = [len(bias) for name, bias in tensors.items()
              if name.startswith(f"{stem}encoder.layers.") and name.endswith(".fc1.bias")]
    return {"width": width, "depth": len(hidden), "mlp": hidden[0], "grid": math.isqrt(patches)}

def official_config(about, alpha, tensors):
    """Config of one of their models: from its config.json (about) and, where that is silent, its tensors."""
    for name, value in (("enc_type", "siglip2"), ("dec_type", "siglip2"), ("codebook_l2_norm", True),
                        ("causal_encoder", True), ("causal_decoder", False), ("model_type", "c2i"),
                        ("cls_token_num", 1), ("rope_base", 10000), ("norm_eps", 1e-5)):
        require(about.get(name, value) == value, f"only {name} {value} is known here", about.get(name))
    c = about.get("causal_num")                             # none: a whole group; 0: every group in parallel
    settings = {"group_size": about["group_size"], "causal_num": -1 if c is None else c}
    if "vocab_size" in about:
        names = {"num_tokens": "block_size", "num_classes": "num_classes", "codebook_size": "vocab_size",
                 "ar_width": "dim", "ar_depth": "n_layer", "ar_heads": "n_head"}
        guidance = {128: 1.45, 512: 1.32}.get(about["block_size"], 1.5)             # the scales of their evaluation
        settings |= {"guidance": guidance, "ar_mlp": len(tensors["layers.0.feed_forward.w1.weight"])}
    else:
        names = {"num_tokens": "num_latent_tokens", "codebook_size": "codebook_size", "code_dim": "codebook_embed_dim",
                 "patch_size": "enc_patch_size", "dec_patch_size": "dec_patch_size", "image_size": "max_image_size",
                 "commit_weight": "commit_loss_beta"}
        settings |= {"alpha": alpha, "correction": "refine_conv.weight" in tensors}
        V, C = tensors["quantize.embedding.weight"].shape
        N = tensors.get("encoder.latent_tokens", torch.empty(1, 0)).shape[1]
        silent = {"num_latent_tokens": N, "codebook_size": V, "codebook_embed_dim": C, "commit_loss_beta": 0.25,
                  "max_image_size": about.get("image_size")}
        about = silent | {name: value for name, value in about.items() if value is not None}
        for side, ours in (("encoder", "enc"), ("decoder", "dec")):
            sizes = tower_sizes(tensors, f"{side}.visual_model.")
            sizes["heads"] = about.get(f"{side}_heads") or {1152: 16, 768: 12}.get(sizes["width"])  # in no tensor
            require(sizes["heads"], f"config.json must name {side}_heads where the width is {sizes['width']}", "none")
            settings |= {f"{ours}_{name}": size for name, size in sizes.items()}
        if "global_token_proj.4.weight" in tensors:
            settings["teacher_width"], settings["align_width"] = tensors["global_token_proj.4.weight"].shape
            settings["align_weight"] = about.get("global_token_loss_weight") or 1.0
    settings |= {ours: about[theirs] for ours, theirs in names.items()}
    return Config(**settings, noise_topk=min(50, settings["codebook_size"]))

def load_official(path):
    """The authors' Tokenizer or ARTransformer, for evaluation. Raises Refused.
    path: their folder, which holds config.json, config.yaml and checkpoints/STEPS.pt, or one of the last."""
    path = Path(path)
    found = list(path.glob("checkpoints/*.pt")) if path.is_dir() else [path]
    require(found, f"{path} must be a checkpoint or a folder that holds checkpoints/*.pt", "none")
    path = max(found, key=lambda file: [int(n) for n in re.findall(r"\d+", file.stem)][-1:])
    checkpoint, folder = read_foreign(path), path.absolute().parent.parent
    with blame(f"{path} with its config.json does not fit"):
        about, yaml = json.loads((folder / "config.json").read_text()), folder / "config.yaml"
        alpha = re.search(r"^ *degradation_power: *(\S+)", yaml.read_text() if yaml.exists() else "", re.MULTILINE)
        kind, names, entries = ((ARTransformer, AR_NAMES, ("ema", "model")) if "vocab_size" in about else
                                (Tokenizer, TOKENIZER_NAMES, ("model", "ema")))     # in the order of their evaluation
        entry = next((name for name in (*entries, "module", "state_dict") if checkpoint.get(name)), None)
        tensors = checkpoint[entry] if entry else checkpoint
        tensors = {re.sub(r"\b(module|_orig_mod)\.", "", name): tensor for name, tensor in tensors.items()}
        config = official_config(about, float(alpha[1]) if alpha else 1.5, tensors)
    ignore = r"repa_model\.|quantize\.codebook_used|quantizer\.counts" + r"|refine_conv\." * (not config.correction)
    model = fill(kind(config), path, tensors, names, ignore)
    model.weights_of = entry
    return model

# -- SigLIP 2: the encoder's first layers, and the teacher of first-token alignment (paper, Section 3.4) --

SIGLIP_HEADS = 16       # which its file does not tell

def siglip_tower(path, layers):
    """The first layers of SigLIP 2's vision tower, from its model.safetensors: a frozen ViT. The norm after its last
    layer goes after these, as the authors do. Raises Refused."""
    tensors = read_safetensors(path, "vision_model.")
    with blame(f"{path} does not hold SigLIP 2"), torch.device("meta"):     # drawing random numbers would be in vain
        width, depth, mlp, grid = tower_sizes(tensors).values()
        p = math.isqrt(tensors["embeddings.patch_embedding.weight"].shape[1] // 3)
        tower = ViT(width, layers, SIGLIP_HEADS, mlp, grid, 0.0, p)
    rest = "|".join(map(str, range(layers, depth)))
    return fill(tower.to_empty(device="cpu"), path, tensors, SIGLIP_NAMES, rf"head\.|encoder\.layers\.({rest})\.")

def alignment_loss(guess, tower, images):
    """Minus the mean cosine of what the first token says (B, D) and the mean feature of the image in the whole frozen
    tower: normed twice, as the authors do."""
    wanted = tower.norm(tower(tower.embed(images))).mean(1)                                     # (B, D)
    return -F.cosine_similarity(guess.float(), wanted.float(), dim=-1, eps=1e-12).mean()

def standardise(images):
    """[-1, 1] -> what networks trained on ImageNet are used to: mean 0 and deviation 1 of each channel."""
    red, green, blue = images.unbind(1)
    return torch.stack([(red + 0.030) / 0.458, (green + 0.088) / 0.448, (blue + 0.188) / 0.450], dim=1)

# -- The perceptual loss --

class PerceptualLoss(nn.Module):
    """Distance of images in the features of a frozen network, `stages`; `weights` of their channels."""
    RAMP, DROPOUT = 500, 0.0        # steps of training over which its weight grows; share of squared errors dropped

    def __init__(self, stages, weights):
        super().__init__()
        self.stages, self.weights, self.dropout = nn.ModuleList(stages), nn.ParameterList(weights), dropout

    def features(self, images):
        """Yields the outputs of the stages. VGG's poolings need 16 pixels: smaller images are enlarged."""
        x = standardise(images if images.shape[-1] >= 16 else F.interpolate(images, (16, 16), mode="bilinear"))
        for stage in self.stages:
            x = stage(x)
            yield x                                                                         # (B, channels, s, s)

    def forward(self, a, b, keys=None):
        """Images a (kB, 3, S, S), in [-1, 1], of each of b (B, 3, S, S) in turn, k times -> distances (kB,).
        keys (kB,): with dropout; None: without."""
        stages = zip(self.features(a), self.features(b), self.weights, strict=True)
        total = 0
        for i, (*pair, weight) in enumerate(stages):
            fa, fb = (F.normalize(x, dim=1, eps=1e-10) for x in pair)
            error = (fa.unflatten(0, (-1, len(fb))) - fb).flatten(0, 1).square()
            total = total + F.conv2d(self.dropout(error, self.DROPOUT, keys, i), weight).float().mean((1, 2, 3))
        return total

class LPIPS(PerceptualLoss):
    """The paper's: VGG16, weighted as people see differences (arXiv 1801.03924). From the paths of torchvision's VGG16
    and of LPIPS's own weights of its channels. Raises Refused."""
    CUTS, WIDTHS = (0, 4, 9, 16, 23, 30), (64, 128, 256, 512, 512)  # up to relu1_2, 2_2, 3_3, 4_3, 5_3
    RAMP, DROPOUT = 10000, 0.5                                      # which the authors' training leaves switched on

    def __init__(self, vgg, linear):
        with torch.device("meta"):
            features = torchvision.models.vgg16().features.to_empty(device="cpu")
        super().__init__([features[a:b] for a, b in itertools.pairwise(self.CUTS)],
                         [torch.empty(1, width, 1, 1) for width in self.WIDTHS])
        fill(features, vgg, read_foreign(vgg), [("^", "features.")], r"classifier\.")
        fill(self.weights, linear, read_foreign(linear), [(r"^(\d)$", r"lin\1.model.1.weight")])

class ClassFeatures(PerceptualLoss):
    """For small images, without a download: a small network in VGG's manner, which train_features() teaches the
    classes of the training images. What tells them apart is what an image must not lose."""

    def __init__(self, classes):
        def layer(width, wider):
            return [nn.Conv2d(width, wider, 3, 1, 1, bias=False), nn.BatchNorm2d(wider), nn.ReLU()]
        super().__init__([nn.Sequential(*layer(3, 32)),
                          nn.Sequential(nn.MaxPool2d(2), *layer(32, 64), *layer(64, 64)),
                          nn.Sequential(nn.MaxPool2d(2), *layer(64, 128), *layer(128, 128))],
                         [torch.ones(1, width, 1, 1) for width in (32, 64, 128)])
        self.weights.requires_grad_(False)
        self.head = nn.Linear(128, classes)

    def classify(self, images):
        """(B, 3, S, S) in [-1, 1] -> logits (B, classes)."""
        *_, last = self.features(images)
        return self.head(last.amax((2, 3)))

# -- The paper's discriminator: DINO's features of augmented images --

class Dino(nn.Module):
    """DINO's ViT-S/16 (arXiv 2104.14294), frozen, with tanh-GELU as the authors run it."""
    WIDTH = 384

    def __init__(self, path):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, self.WIDTH, 16, 16)
        self.class_token = nn.Parameter(torch.zeros(1, 1, self.WIDTH))
        self.positions = nn.Parameter(torch.zeros(1, 197, self.WIDTH))
        self.blocks = nn.ModuleList(Block(self.WIDTH, 6, 4 * self.WIDTH) for _ in range(12))
        fill(self, path, read_foreign(path), DINO_NAMES, r"norm\.")

    def forward(self, images):
        """(B, 3, 224, 224) -> five features (B, 384, 196), of the input and of layers 3, 6, 9 and 12: each
        patch's plus the class token's."""
        x = self.patch_embed(images).flatten(2).transpose(1, 2).float()
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1) + self.positions # (B, 197, 384)
        features = [x]
        for i, block in enumerate(self.blocks):
            x, _ = block(x)
            if i % 3 == 2:
                features.append(x)
        return [(x[:, 1:] + x[:, :1]).transpose(1, 2) for x in features]

class DinoDiscriminator(Discriminator):
    """The paper's: a frozen DINO looks, and five small heads, all that is trained, score each patch."""
    consistency = 4.0

    def __init__(self, dino):
        super().__init__()
        self.dino, D, norm = [dino], dino.WIDTH, nn.utils.parametrizations.spectral_norm    # a list: no part of us
        def layer(kernel):
            conv = nn.Conv1d(D, D, kernel, padding=kernel // 2, padding_mode="circular")
            return nn.Sequential(norm(conv), nn.BatchNorm1d(D, eps=1e-6), nn.LeakyReLU(0.2))
        heads = ([layer(1), layer(9), norm(nn.Conv1d(D, 1, 1))] for _ in range(5))
        self.heads = nn.ModuleList(nn.ModuleList(head) for head in heads)

    def score(self, images, key):
        """(B, 3, S, S) in [-1, 1], key (1,) -> scores (B, 5 * 196). Of images above 224 pixels it sees, with
        probability 1/2, a crop, the same for the batch; all else is resized."""
        x, S, side = standardise(images.float()), images.shape[-1], 224
        seen = resize(x, side)
        if S > side:
            u, window = uniform(key, 3)[0], torch.arange(side, device=x.device)
            rows, columns = ((u[i] * (S - side + 1)).long() + window for i in (1, 2))
            seen = torch.where(u[0] < 0.5, x.index_select(2, rows).index_select(3, columns), seen)
        scores = []
        for (first, second, last), feature in zip(self.heads, self.dino[0](seen), strict=True):
            h = first(feature)                                                          # (B, 384, 196)
            scores.append(last((h + second(h)) / math.sqrt(2)).flatten(1))
        return torch.cat(scores, dim=1)

# == 12. Data ==========================================================================================================

BUILT_IN = {"shapes": 10, "cifar10": 10}            # small sets and their classes; all else is a folder
Image.MAX_IMAGE_PIXELS = None                       # huge pictures are welcome

def to_float(pixels):
    """uint8 -> float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1

def to_uint8(images):
    """Float in [-1, 1] -> uint8, clamped and rounded: to_uint8(to_float(x)) == x."""
    return (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8)

def chunks(items, size):
    """A sequence in lists of at most `size`."""
    return [list(items[i:i + size]) for i in range(0, len(items), size)]

SHAPES = {"train": 20000, "val": 2000}                      # pictures in a split

class Shapes(torch.utils.data.Dataset):
    """Ten shapes drawn by the program: item i is (uint8 image (3, size, size), label i % 10), always the same. Place,
    size, turn and colours are the coarse part of a picture, stripes and checks of four pixels the fine part."""
    classes = ("disc", "ring", "square", "frame", "triangle", "cross", "flower", "bar", "crescent", "pair")

    def __init__(self, split="train", size=32):
        require(split in SHAPES, f"split must be one of {', '.join(SHAPES)}", repr(split))
        require(type(size) is int and size >= 1, "size must be a whole number of at least 1 pixel", size)
        self.size, self.length, self.key = size, SHAPES[split], root_key(0, split)

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if not isinstance(index, int) or not 0 <= index < self.length:
            raise IndexError(f"an index must be a whole number in 0..{self.length - 1}, got {index!r}")
        return self.draw(torch.tensor([index]))[0], index % 10

    def draw(self, indices):
        """Pictures number `indices` (M,) -> uint8 (M, 3, size, size). Raises Refused."""
        check(indices, "indices", ("M",), self.length - 1)
        S, indices = self.size, indices.long()
        u = uniform(fold(self.key, indices), 12)[..., None, None]                     # (M, 12, 1, 1)
        y, x = torch.meshgrid(*[(torch.arange(S) + 0.5) / S] * 2, indexing="ij")                # (S, S) in 0..1
        radius, turn = 0.32 + 0.08 * u[:, 0], 0.3 * (u[:, 1] - 0.5)
        dx, dy = x - 0.45 - 0.1 * u[:, 2], y - 0.45 - 0.1 * u[:, 3]                             # from the centre
        dx, dy = (dx * turn.cos() + dy * turn.sin()) / radius, (dy * turn.cos() - dx * turn.sin()) / radius
        r, ax, ay, box = torch.hypot(dx, dy), dx.abs(), dy.abs(), torch.maximum(dx.abs(), dy.abs())
        outlines = torch.stack([        # how far from the outline of each shape, roughly; negative inside
            r - 0.85, (r - 0.72).abs() - 0.2, box - 0.78, (box - 0.7).abs() - 0.18,
            torch.maximum(dy - 0.7, 0.87 * ax - 0.5 * dy - 0.5),
            torch.minimum(torch.maximum(ax - 0.28, ay - 1), torch.maximum(ax - 1, ay - 0.28)),
            r - 0.65 - 0.35 * torch.cos(5 * torch.atan2(dx, -dy)), torch.maximum(ax - 1.1, ay - 0.32),
            torch.maximum(r - 0.95, 0.75 - torch.hypot(dx - 0.45, dy)),
            torch.minimum(torch.hypot(dx + 0.5, dy + 0.5), torch.hypot(dx - 0.5, dy - 0.5)) - 0.45], dim=1)
        distance = outlines.take_along_dim((indices % 10)[:, None, None, None], 1)[:, 0]        # (M, S, S)
        inside = (0.5 - distance * radius * S).clamp(0, 1)                                      # soft over one pixel
        a, b = (2 * math.pi * x * S / 8).sin().sign(), (2 * math.pi * y * S / 8).sin().sign()   # a period of 8 pixels
        texture = torch.stack([0 * a, a, b, a * b])[(4 * u[:, 4, 0, 0]).long()]                 # plain, stripes, checks
        light, dark, swap = 0.75 + 0.25 * u[:, 5], 0.1 + 0.2 * u[:, 6], u[:, 7] < 0.5
        front = torch.where(swap, light, dark) + 0.1 * texture
        back = torch.where(swap, dark, light) + 0.2 * (u[:, 8] - 0.5) * (y - 0.5)               # a vertical ramp
        hue = 2 * math.pi * (u[:, 9:11] + torch.arange(3).view(3, 1, 1, 1, 1) / 3)              # (3, M, 2, 1, 1)
        tint = 0.75 + 0.25 * hue.cos()
        image = inside * front * tint[:, :, 0] + (1 - inside) * back * tint[:, :, 1]            # (3, M, S, S)
        return (image.transpose(0, 1) * 255).round().clamp(0, 255).to(torch.uint8)

def crop(image, side, share=1.0, u=None):
    """A PIL image cropped to side x side: ADM's centre crop. With four numbers u in [0, 1): the authors' crop for
    training, of random scale (the shorter side becomes side .. side / share), place and mirroring."""
    short = side if u is None else side + int(u[0] * (math.ceil(side / share) - side + 1))
    while min(image.size) >= 2 * short:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = short / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    x, y = image.width - side, image.height - side
    left, top = (x // 2, y // 2) if u is None else (int(u[1] * (x + 1)), int(u[2] * (y + 1)))
    image = image.crop((left, top, left + side, top + side))
    return image.transpose(Image.FLIP_LEFT_RIGHT) if u is not None and u[3] < 0.5 else image

def read_picture(path):
    """The picture in a file, RGB; an animation's first frame. Raises Refused."""
    with blame(f"{path} can't be read as a picture"), Image.open(path) as image:
        if image.mode.startswith("I"):       # 16-bit grey: scaled, where convert() would cut off
            image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
        return image.convert("RGB")

class Images:
    """A data set held on the device: labels (M,), class names, and pixels, uint8 (M, 3, side, side)."""
    def __init__(self, labels, classes, pixels):
        self.labels, self.classes, self.pixels = labels, classes, pixels

    def __len__(self):
        return len(self.labels)

    def fetch(self, batches):
        """uint8 (B, 3, side, side) for each batch, a list of (row number, None or four numbers in [0, 1) to augment
        the image by). Small as these are, they are only mirrored."""
        for batch in batches:
            table = torch.tensor([(row, u is not None and u[0] < 0.5) for row, u in batch])
            rows, mirrored = table.T.to(self.pixels.device, non_blocking=True)                  # (B,) each
            images = self.pixels[rows]                                                          # (B, 3, side, side)
            yield torch.where(mirrored[:, None, None, None] > 0, images.flip(3), images)

    def in_order(self, rows, batch):
        """(rows, uint8 images) batch by batch, for a sequence of row numbers."""
        batches = chunks(rows, batch)
        return zip(batches, self.fetch([(row, None) for row in rows] for rows in batches), strict=True)

def leave_group(worker):
    """Ctrl-C, and torchrun's SIGTERM, are meant for a whole group of processes: not for a data loader's workers, whose
    images the process that will save and stop may still need."""
    os.setpgrp()

class Folder(Images):
    """Images in class folders, cropped as they are read. With train/ and val/ (or test/) in the folder these are the
    splits; else every 20th image is kept for validation. A broken file is named once, and the next of its class takes
    its place. Raises Refused: no images, a class without any, or too many broken."""
    def __init__(self, root, split, side, share=1.0, classes=None, workers=0):
        self.side, self.share, self.workers = side, share, workers
        found, self.samples, self.broken = self.scan(Path(root), split)
        self.classes = classes or found
        unknown, number = set(found) - set(self.classes), {name: i for i, name in enumerate(self.classes)}
        require(not unknown, f"the {split} images of {root} must be of the training data's classes", sorted(unknown))
        self.labels = torch.tensor([number[found[label]] for _, label in self.samples])

    @staticmethod
    @functools.cache
    def scan(root, split):
        """Classes, [(path, class), ...] and which are broken: looked up once, and known to all stages and workers."""
        require(root.is_dir(), "--data must be shapes, cifar10 or a folder of images in class folders", root)
        parts = [name for name in ("train", "val", "test") if (root / name).is_dir()]
        require(not parts or ("train" in parts and len(parts) > 1),
                f"{root} must hold train and val (or test), or class folders alone", " and ".join(parts))
        part = root / (parts[split != "train"] if parts else "")
        kinds = " ".join(torchvision.datasets.folder.IMG_EXTENSIONS)
        with blame(f"{part} must hold class folders of images, CLASS/IMAGE, IMAGE being one of {kinds}"):
            found = torchvision.datasets.ImageFolder(part, allow_empty=split != "train")
            require(found.samples, "there must be images", "none")
        samples = found.samples
        if not parts and len(samples) >= 20:
            samples = [s for i, s in enumerate(samples) if (i % 20 == 19) == (split == "val")]
        return found.classes, samples, torch.zeros(len(samples), dtype=torch.bool).share_memory_()

    def read(self, row):
        """The picture in file number `row`, RGB; of the next of its class that can be read where that is broken."""
        while True:
            if not self.broken[row]:
                try:
                    return read_picture(self.samples[row][0])
                except Refused as error:
                    self.broken[row] = True
                    sys.stderr.write(f"\nskipped: broken image {self.broken.sum()} of {len(self)}: {error}\n")
            others = ((self.labels == self.labels[row]) & ~self.broken).nonzero().flatten().tolist()
            require(others and self.broken.sum() <= 1 + len(self) // 100, "at most one image in a hundred, and not all "
                    "of a class, may be broken", f"{self.broken.sum()} of {len(self)}, like {self.samples[row][0]}")
            row = next((i for i in others if i > row), others[0])

    def __getitem__(self, item):
        """(row number, u of crop()) -> uint8 (3, side, side)."""
        row, u = item
        return torch.from_numpy(np.array(crop(self.read(row), self.side, self.share, u))).permute(2, 0, 1)

    def fetch(self, batches):
        """The same, read ahead by worker processes; augmented by crop()."""
        # On Linux forked: a fork server, the way of Python 3.14, would be in the group, and copies the list of files.
        how = "fork" if self.workers and sys.platform == "linux" else None
        return torch.utils.data.DataLoader(
            self, batch_sampler=batches, num_workers=self.workers, worker_init_fn=leave_group,
            multiprocessing_context=how, pin_memory=torch.cuda.is_available())

def open_data(config, machine, split, side=None, share=1.0, classes=None):
    """The `train` or `val` images, side x side pixels [image_size], which must be of `classes`, where these are given
    -> Images. Raises Refused."""
    side = side or config.image_size

    def built_in(labels, names, pixels):
        require(classes in (None, names), f"the classes of --data {config.data} must be those of the training data",
                f"{', '.join(names[:3])} ... for {', '.join(classes or [])[:100]}")
        return Images(labels, names, pixels.to(machine.device))

    if config.data == "shapes":
        drawn, rows = Shapes(split, side), torch.arange(SHAPES[split])
        pixels = torch.cat([drawn.draw(some) for some in rows.split(500)])
        return built_in(rows % 10, list(drawn.classes), pixels)
    if config.data == "cifar10":
        require(side == 32, "cifar10 has images of 32 pixels: image_size must be 32", side)
        source = torchvision.datasets.CIFAR10
        remedy = f": unpack {source.url} in {CACHE}, or give a folder of images: --data FOLDER"
        with blame("CIFAR-10 can't be downloaded", remedy), machine.first():
            cifar = source(CACHE, train=split == "train", download=True)
        pixels = torch.from_numpy(cifar.data).permute(0, 3, 1, 2).contiguous()
        return built_in(torch.tensor(cifar.targets), cifar.classes, pixels)
    return Folder(config.data, split, side, share, classes, config.workers)

@functools.lru_cache(maxsize=2)
def epoch_order(key, count):
    """The order of `count` images in the epoch that has this key, an int: (count,)."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(key & (2**63 - 1)))

def batch_rows(config, machine, stage, step, batch, count):
    """This process's share of a step: rows of the data set and a key for each, (batch / world,) int64 both."""
    key = root_key(config.seed, stage)
    # Places in the endless sequence of epochs, by turns: so the same images come first, and are coarse, in any number.
    place = torch.arange(step * batch + machine.rank, (step + 1) * batch, machine.world)
    rows = [epoch_order(fold(key, epoch).item(), count)[place[place // count == epoch] % count]
            for epoch in (place // count).unique().tolist()]
    return torch.cat(rows), fold(key, place)

def training_batches(config, machine, data, start, stop):
    """Steps start .. stop-1 of tokenizer training: (step, images (b, 3, R, R) in [-1, 1], labels and keys (b,)), on the
    device."""
    plans, ahead = itertools.tee(batch_rows(config, machine, "tokenizer", step, config.tok_batch, len(data))
                                 for step in range(start, stop))
    varied = (list(zip(rows.tolist(), uniform(keys, 4).tolist(), strict=True)) for rows, keys in ahead)
    for step, images, (rows, keys) in zip(range(start, stop), data.fetch(varied), plans, strict=True):
        batch = images, data.labels[rows], keys
        images, labels, keys = (t.to(machine.device, non_blocking=True) for t in batch)
        yield step, to_float(images), labels, keys

# == 13. Training: what both stages share ==============================================================================

class Machine(NamedTuple):
    """Where this process runs: one of `world` processes under torchrun, or the only one."""
    device: torch.device
    dtype: torch.dtype = torch.float32
    rank: int = 0
    world: int = 1

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    @contextlib.contextmanager
    def first(self):
        """Rank 0 goes through the block before the others do."""
        if self.rank:
            self.barrier()
        try:
            yield
        finally:                            # also when it failed: then the others will fail alike
            if not self.rank and not isinstance(sys.exc_info()[1], KeyboardInterrupt):
                self.barrier()

    def total(self, tensor):
        """Sum over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def say(self, text):
        if self.rank == 0:
            print(text, flush=True)

def start_machine(config):
    """Choose device and precision; under torchrun join the other processes. Raises Refused."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    wanted = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    with blame(f"device {wanted} can't be used by {world} processes"):
        device = torch.device(wanted)
        require(device.type in ("cpu", "cuda"), "device must be auto, cpu, cuda or cuda:0, ...", wanted)
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
            torch.cuda.set_device(device)
            torch.backends.cuda.enable_cudnn_sdp(False)     # its gradients can be NaN under a mask (pytorch #196678)
        torch.zeros(1, device=device)
        if world > 1 and not dist.is_initialized():
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=datetime.timedelta(days=1))    # of waiting for a download, say
    auto = "bfloat16" if device.type == "cuda" else "float32"
    return Machine(device, getattr(torch, auto if config.dtype == "auto" else config.dtype), rank, world)

def learning_rate(step, steps, warmup, peak, first, last, start=0):
    """Linear from `first` to `peak` in `warmup` steps; then a cosine to `last`, counted from step `start`: in the
    authors' code 0 for the tokenizer, the end of the warm-up for the AR transformer."""
    if step < warmup:
        return first + (peak - first) * step / warmup
    return last + (peak - last) * (1 + math.cos(math.pi * (step - start) / max(steps - start, 1))) / 2

class Muon(torch.optim.Optimizer):
    """Momentum SGD with orthogonalised updates of matrices: every direction moves equally far, so that small models
    trained from scratch learn in a fraction of AdamW's steps (Jordan et al. 2024). torch.optim.Muon does it matrix by
    matrix; this all of a shape at once, and on a CPU in float32, as in bfloat16 two processes drift from one."""
    found_inf = torch.zeros(())             # 1: change nothing; as in torch's fused optimisers

    @torch.no_grad()
    def step(self):
        keep = 1 - self.found_inf
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                momentum = self.state[p]["momentum"]
                grad = torch.where(keep > 0, p.grad, momentum)
                shapes.setdefault(p.shape, []).append((p, grad.lerp(momentum.lerp_(grad, 0.05), 0.95)))     # Nesterov
            for shape, pairs in shapes.items():
                x = torch.stack([step for _, step in pairs])                                # (m, *shape)
                x = x.mT if shape[0] > shape[1] else x
                x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
                x = x.to(torch.bfloat16 if x.is_cuda else torch.float32)
                for _ in range(5):      # a x + b x^3 + c x^5, five times over, brings singular values near 1
                    square = x @ x.mT
                    x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
                x = 0.2 * max(shape) ** 0.5 * keep * (x.mT if shape[0] > shape[1] else x).float()   # AdamW's size
                for (p, _), step in zip(pairs, x, strict=True):
                    p.mul_(1 - keep * group["lr"] * group["weight_decay"]).sub_(group["lr"] * step)

class Optimizers:
    """The optimisers of a module: AdamW with the authors' betas; for kind "muon" the matrices of the transformer layers
    use Muon, which works best at 2.5 times AdamW's learning rate. Vectors have no weight decay."""
    def __init__(self, module, kind, lr, weight_decay=0.0, betas=(0.9, 0.95)):
        self.module, self.steps, self.bad_in_a_row = module, 0, 0
        groups = {"hidden": [], "matrices": [], "vectors": []}
        for name, p in module.named_parameters():
            hidden = kind == "muon" and "blocks." in name and p.ndim == 2
            groups["hidden" if hidden else "matrices" if p.ndim >= 2 else "vectors"].append(p)
        self.parts = {"adamw": torch.optim.AdamW([{"params": groups["matrices"], "weight_decay": weight_decay},
                                                  {"params": groups["vectors"], "weight_decay": 0.0}],
                                                 lr=lr, betas=betas, fused=True)}
        if hidden := groups["hidden"]:
            self.parts["muon"] = Muon([{"params": hidden, "lr_scale": 2.5}], {"lr": lr, "weight_decay": weight_decay})

    def step(self, lr):
        """One step with the gradient clipped at norm 1 -> its norm before that. A non-finite gradient changes nothing;
        ten of them in a row are refused. (On a GPU that is checked every ten steps only, as it would have to wait.)"""
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None])
        bad = (~norm.isfinite()).float()
        self.steps, self.bad_in_a_row = self.steps + 1, (self.bad_in_a_row + 1) * bad
        if (self.steps % 10 == 0 or bad.device.type == "cpu") and self.bad_in_a_row >= 10:
            names = [n for n, p in self.module.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
            raise Refused(f"ten steps in a row had gradients that are not finite, first of {', '.join(names[:3])}: "
                          "the last checkpoint is good; try a lower learning rate (in another --out)")
        torch.nn.utils.clip_grads_with_norm_(self.module.parameters(), 1.0, norm)   # (a norm of NaN spoils them all)
        for optimizer in self.parts.values():
            optimizer.found_inf = bad
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1)
            optimizer.step()
            optimizer.zero_grad()
        return norm

def backward(loss):
    """Backpropagate. A loss that is not finite is made to give such gradients, so that Optimizers.step() sees it."""
    loss.backward(1 + 0 * loss.detach())

def update_ema(ema, module, decay, step):
    """ema <- d ema + (1 - d) module with d = min(decay, (1 + step) / (10 + step)): early weights soon fade."""
    if ema is not None:
        average = get_ema_multi_avg_fn(min(decay, (1 + step) / (10 + step)))
        average(list(ema.parameters()), list(module.parameters()), None)
        for kept, new in zip(ema.buffers(), module.buffers(), strict=True):
            kept.copy_(new)

def wrap(module, config, machine):
    """Compile the transformer layers and wrap for DDP, as asked for."""
    if config.compile:
        torch._dynamo.config.recompile_limit = 64           # all networks' layers are variants of the same code
        torch._dynamo.config.optimize_ddp = False           # which would cut each layer into pieces
        for layer in module.modules():
            if isinstance(layer, (Block, ARBlock)):
                layer.compile()
            elif hasattr(layer, "dropout"):                 # a dozen steps over large tensors, made one
                layer.dropout = torch.compile(layer.dropout)
    if machine.world == 1 or not any(p.requires_grad for p in module.parameters()):
        return module
    unused = isinstance(module, Tokenizer)                  # where nothing is corrected, retry_queries have no gradient
    with warnings.catch_warnings(action="ignore"):          # of an argument whose successor torch 2.11 does not know
        return DistributedDataParallel(module, find_unused_parameters=unused, broadcast_buffers=False)  # all are alike

def short_hash(*things):
    """16 digits that tell one set of settings and modules' weights from another."""
    digest = hashlib.sha256()
    for thing in things:
        module = isinstance(thing, nn.Module)
        for part in thing.state_dict().values() if module else [thing]:
            digest.update(part.cpu().contiguous().view(torch.uint8).numpy() if module else json.dumps(part).encode())
    return digest.hexdigest()[:16]

@contextlib.contextmanager
def written_whole(path):
    """A binary file to write to, that gets its name when it is whole: nobody ever sees a part. Raises Refused."""
    aside = path.with_name(path.name + ".tmp")
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:        # of a full disk torch.save makes either, with or without the other
        aside.unlink(missing_ok=True)
        reason = next((e for e in (error, error.__context__) if isinstance(e, OSError)), error)
        raise Refused(f"{path} can't be written ({reason}); what was there before is whole") from error

def save_checkpoint(path, config, stage, step, about, parts):
    """All that sample.py and a resumed run need. Raises Refused."""
    state = {"format": 1, "stage": stage, "step": step, "config": asdict(config), "about": about}
    state |= {name: part.state_dict() for name, part in parts.items() if part is not None}
    with written_whole(path) as file:
        torch.save(state, file)

def load_checkpoint(path, stage):
    """What save_checkpoint wrote, as a dict of tensors on the CPU, its settings as Config. Raises Refused."""
    try:
        open(path, "rb").close()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Refused(f"no checkpoint {path}: a wrong path, or not trained yet (python detailflow.py --out FOLDER, "
                      "with its --preset and --data)") from error
    with blame(f"{path} does not fit", ": delete it and train again"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        require(not zipfile.ZipFile(path).testzip(), "checksums must be right", "another")      # torch compares none
        made_by = (state.get("format"), state.get("stage")) if isinstance(state, dict) else None
        require(made_by == (1, stage), f"it must be a checkpoint of the {stage} stage of this version", made_by)
        config = Config(**state["config"])
        return state | {"config": config, "about": dict(state["about"]), "step": int(state["step"])}

def resume(path, config, stage, groups, about, parts):
    """Restore `parts` from the checkpoint at `path`, if there is one -> steps done. Raises Refused.
    Randomness being a function of seed and step (section 1), there is no other state. More steps may be asked for than
    before; other settings, or other data (`about` tells), are refused."""
    if not path.exists():
        return 0
    state = load_checkpoint(path, stage)
    names = {f.name for f in fields(Config) if f.metadata["group"] in groups} - {"data", "tok_steps", "ar_steps"}
    now, then = ({name: getattr(c, name) for name in ("seed", *sorted(names))} | more
                 for c, more in ((config, about), (state["config"], state["about"])))
    changed = [f"{name} {then.get(name)} -> {value}" for name, value in now.items() if then.get(name) != value]
    require(not changed, f"{path} must be trained with the same settings and data (choose another --out, or delete it)",
            "; ".join(changed))
    with blame(f"{path} does not fit", ": delete it and train again"):
        for name, part in parts.items():
            if part is not None:
                part.load_state_dict(state[name])
    return state["step"]

def load_model(path, stage, device="cpu", ema=True):
    """Tokenizer or (stage "ar") ARTransformer from a checkpoint, its averaged weights if it has any, or from a folder
    of the authors', or a checkpoint there -> model, about. Raises Refused."""
    kind = Tokenizer if stage == "tokenizer" else ARTransformer
    folder = Path(path).absolute().parent
    if Path(path).is_dir() or (folder.name == "checkpoints" and (folder.parent / "config.json").is_file()):
        model, about = load_official(path), {}      # their files name no classes
        require(isinstance(model, kind), f"{path} must hold a {kind.__name__}", type(model).__name__)
    else:
        state = load_checkpoint(path, stage)
        with blame(f"{path} does not fit", ": delete it and train again"):
            model, about = kind(state["config"]), state["about"]
            model.weights_of = "ema" if ema and "ema" in state else "model"
            model.load_state_dict(state[model.weights_of])
    return model.to(device).eval().requires_grad_(False), about

def load_ar(path, tokenizer, device, ema=True):
    """An AR transformer that fits a tokenizer -> model, its class names (None for the authors'). Raises Refused."""
    model, made_with = load_model(path, "ar", device, ema)
    ours, theirs = ([getattr(m.config, name) for name in ("num_tokens", "group_size", "causal_num", "codebook_size")]
                    for m in (tokenizer, model))
    require(ours == theirs, f"{path} must have the N, G, c and V of its tokenizer, {ours}", theirs)
    if ema and made_with.get("tokenizer") not in (None, short_hash(tokenizer)):
        raise Refused(f"{path} was trained on codes of another tokenizer: take that one, or delete {path}")
    return model, made_with.get("classes")

def fill_file(path, record, machine, images, work):
    """A memory-mapped array of records, made when it is missing: each process fills its share, and the file gets its
    name when all is done. A killed job goes on with the records that are not marked as done, also with another number
    of processes. record: fields of a numpy dtype; work(rows) yields (some of the rows, {field: tensor})."""
    aside, record = path.with_suffix(".part"), np.dtype([("done", "?"), *record])
    machine.barrier()
    if path.exists():
        return np.load(path, mmap_mode="r")
    with machine.first():
        if machine.rank == 0 and not aside.exists():
            with written_whole(aside) as file:
                header = {"descr": np.lib.format.dtype_to_descr(record), "fortran_order": False, "shape": (images,)}
                np.lib.format.write_array_header_2_0(file, header)
                for _ in range(images):                     # take the room now: a mapped file that finds no more
                    file.write(bytes(record.itemsize))      # later kills us without a word
    file = np.load(aside, mmap_mode="r+")
    todo = np.arange(images)[machine.rank::machine.world]
    todo = todo[~file["done"][todo]].tolist()
    bar = tqdm(total=len(todo), desc=path.stem, unit="image", disable=True if machine.rank else None)

    def write(rows, values):
        for name, value in values.items():
            file[name][rows] = value.cpu().numpy()
        file.flush()                                        # first the record, then the mark
        file["done"][rows] = True
        bar.update(len(rows))

    with ThreadPoolExecutor(1) as writer:                   # a GPU is at the next batch while the last is written
        last = writer.submit(int)                           # nothing to wait for yet
        for batch in work(todo):
            last.result()
            last = writer.submit(write, *batch)
        last.result()
    bar.close()
    file.flush()
    machine.barrier()
    with machine.first():
        if machine.rank == 0:
            os.replace(aside, path)
    return np.load(path, mmap_mode="r")

def read_log(path):
    """The records of a log.jsonl, if there is one; a kill may have torn the last line. Raises Refused."""
    with blame(f"{path} does not fit", ": delete it"):
        lines = path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []
        return [r for r in map(json.loads, lines) if r["step"] >= 0 and r["stage"]]

class Progress:
    """A stage's bar, its lines in OUT/log.jsonl, and when to save. Sums stay on the device until a line is due: no
    step waits for a number. Ctrl-C and SIGTERM, which guarded() notes in `asked`, end the step and save."""
    asked = None                                        # None: no training that could end gently; 0: not asked to

    def __init__(self, config, machine, stage, start, steps, batch):
        self.config, self.machine, self.stage, self.steps, self.batch = config, machine, stage, steps, batch
        self.sums, self.count, self.since, self.path = {}, 0, time.time(), Path(config.out) / "log.jsonl"
        self.bar = tqdm(total=steps, initial=start, desc=stage, disable=True if machine.rank else None)
        if machine.rank == 0:                           # what was logged after the last checkpoint comes again
            records = [r for r in read_log(self.path) if r["stage"] != stage or r["step"] <= start]
            with written_whole(self.path) as file:
                file.writelines(json.dumps(r).encode() + b"\n" for r in records)
        gpu = torch.cuda.get_device_name() if machine.device.type == "cuda" else None
        self.write(start, {"torch": torch.__version__, "gpu": gpu, "cores": os.cpu_count(), "world": machine.world,
                           "config": asdict(config)})
        Progress.asked = 0

    def write(self, step, record, text=None):
        """A line of the log; with a text, one on the screen."""
        if self.machine.rank == 0:
            with open(self.path, "a") as file:
                file.write(json.dumps({"stage": self.stage, "step": step, **record}) + "\n")
            if text:
                self.bar.write(f"{self.stage} {step:6d}/{self.steps}  {text}")

    def step(self, done, lr, **values):
        """Count a step; every log_every steps write the means since the last line -> is a checkpoint due?
        A step with a number that is not finite (a gradient's norm, say) is left out of the means: `skipped` counts."""
        self.bar.update()
        self.count += 1
        taken = torch.stack([v.detach() for v in values.values()]).isfinite().all().float()
        for name, value in values.items():              # each with its own count: some begin late
            pair = torch.stack([value.detach().nan_to_num(0, 0, 0), torch.ones_like(taken)]) * taken
            self.sums[name] = self.sums.get(name, 0) + pair
        if done % self.config.log_every == 0 or done == self.steps:
            sums = {name: self.machine.total(pair).tolist() for name, pair in self.sums.items()}
            record = {"lr": lr, "images_per_s": self.count * self.batch / (time.time() - self.since),
                      **{name: total / max(count, 1) for name, (total, count) in sums.items()},
                      "skipped": self.count - round(sums["grad_norm"][1] / self.machine.world)}
            self.write(done, record, "  ".join(f"{k} {v:.4g}" for k, v in record.items()))
            self.sums, self.count, self.since = {}, 0, time.time()
        self.leaving = self.asked
        if self.machine.world > 1:                      # processes must agree: at every tenth step they ask each other
            every = done % 10 == 0 or done == self.steps
            self.leaving = every and int(self.machine.total(torch.tensor(self.asked, device=self.machine.device)))
        return done % self.config.save_every == 0 or done == self.steps or self.leaving > 0

    def save(self, done, about, parts):
        """Write the checkpoint OUT/STAGE.pt; then leave, if that was asked for, or when all is done."""
        if self.machine.rank == 0:
            save_checkpoint(self.path.with_name(f"{self.stage}.pt"), self.config, self.stage, done, about, parts)
        self.machine.barrier()
        leaving = self.leaving or (done == self.steps and self.asked)       # (while the last one was written)
        if leaving or done == self.steps:
            self.bar.close()
            number, Progress.asked = self.asked or signal.SIGTERM, None
        if leaving:
            raise KeyboardInterrupt(f"stopped after step {done} of {self.steps} of the {self.stage} stage", number)

# == 14. Pictures ======================================================================================================

def save_picture(rows, path):
    """Rows of images (rows, columns, 3, S, S) in [-1, 1] as one PNG, small images enlarged."""
    images = F.interpolate(rows.flatten(0, 1), scale_factor=max(1, 64 // rows.shape[-1]))
    with written_whole(path) as file:
        torchvision.utils.save_image((images + 1) / 2, file, "png", nrow=rows.shape[1], pad_value=1)

def save_plot(path, title, curves):
    """Curves {name: [(x, y), ...]} as one PNG: 720 x 420 pixels, x from 70 to 690, y from 380 up to below the names."""
    points, top = np.array(list(itertools.chain(*curves.values()))), 30 + 20 * len(curves)
    low, span = points.min(0), np.where(np.ptp(points, 0) > 0, np.ptp(points, 0), 1)
    picture = Image.new("RGB", (720, 420), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(16)
    pen.text((70, 8), title, "black", font)
    for share in np.linspace(0, 1, 5):
        (x, y), row = low + share * span, 380 + share * (top - 380)
        pen.line([70, row, 690, row], "lightgrey")
        pen.text((62, row), f"{y:.3g}", "black", font, "rm")
        pen.text((70 + (round(x) - low[0]) / span[0] * 620, 388), f"{round(x)}", "black", font, "mt")   # x is a count
    for i, (name, curve) in enumerate(curves.items()):
        color, places = ("royalblue", "darkorange")[i % 2], (70, 380) + (curve - low) / span * (620, top - 380)
        pen.line(places.round().flatten().tolist(), color, 3)
        pen.text((690, 8 + 20 * i), name, color, font, "ra")
    with written_whole(path) as file:
        picture.save(file, "png")

def strip_lengths(config):
    """Up to eight prefix lengths from 1 to N, about evenly spaced on a log scale."""
    wanted = [config.num_tokens ** (i / 7) for i in range(8)]
    return sorted({min(prefix_lengths(config), key=lambda n: abs(n - w)) for w in wanted})

def coarse_to_fine(tokenizer, codes):
    """Each sequence (B, N) decoded from more and more of its codes, enlarged to R: (B, lengths, 3, R, R)."""
    R = tokenizer.config.image_size
    steps = (tokenizer.decode(codes[:, :n]) for n in strip_lengths(tokenizer.config))
    return torch.stack([F.interpolate(x, (R, R)) for x in steps], dim=1)

def examples(images, machine):
    """Eight pictures of a data set, spread over it: uint8 (8, 3, R, R)."""
    apart = max(0, len(images) // 8 - 1) | 1                # odd: every tenth of the shapes is the same shape
    return next(images.in_order(range(0, len(images), apart)[:8], 8))[1].to(machine.device)

def reconstructions(tokenizer, pixels):
    """A row for each uint8 image (B, 3, R, R): from 1 ... N tokens, then itself. (B, lengths + 1, 3, R, R)."""
    images = to_float(pixels)
    return torch.cat([coarse_to_fine(tokenizer, tokenizer.encode(images)), images[:, None]], dim=1)

@torch.no_grad()
def spoil(tokenizer, images, start, ranks):
    """Images (B, 3, R, R) decoded; with a group spoilt, see correct(), and the rest kept; and with it encoded again."""
    patches = tokenizer.encode_patches(images)
    clean = tokenizer.quantize(patches)
    fixed = tokenizer.correct(patches, clean, start, ranks)
    kept = torch.where(fixed.redone, clean.codes, fixed.shown)                                  # (B, N)
    return [tokenizer.decode(codes) for codes in (clean.codes, kept, fixed.shown)]

def repairs(tokenizer, pixels):
    """What self-correction mends, a row for each uint8 image (B, 3, R, R): itself, decoded, with the first parallel
    group spoilt and the rest kept, with the rest encoded again, and what that changes in these two, fourfold."""
    images, config = to_float(pixels), tokenizer.config
    start = torch.full((len(images),), config.causal_num, device=images.device)
    ranks = torch.full((len(images), config.group_size), config.noise_topk - 1, device=images.device)
    good, *pair = spoil(tokenizer, images, start, ranks)
    return torch.stack([images, good, *pair, *[(4 * (x - good).abs() - 1).clamp(max=1) for x in pair]], dim=1)

def sampling_settings(config):
    return {name: getattr(config, name) for name in ("guidance", "schedule", "temperature", "top_k", "top_p")}

def draw_batches(config, machine, tokenizer, model, labels, rows, num_tokens=None):
    """Draw the images with numbers `rows`, of labels[rows]: yields (some rows, codes (b, n), uint8 (b, 3, S, S)).
    Image i has seed + i, so neither batch nor process matters."""
    for part in chunks(rows, config.eval_batch):
        more = config.eval_batch - len(part) if config.compile and len(rows) > config.eval_batch else 0
        drawn = torch.tensor(part + part[:1] * more)            # a short last batch would be compiled anew
        settings = sampling_settings(config) | {"seeds": config.seed + drawn, "num_tokens": num_tokens}
        with machine.autocast():
            codes = generate(model, labels[drawn], **settings)
            pixels = to_uint8(tokenizer.decode(codes))
        yield part, codes[:len(part)], pixels[:len(part)]

def samples(config, machine, tokenizer, model):
    """Eight images of each of the first ten classes: codes (classes * 8, N), pixels (classes, 8, 3, R, R)."""
    labels = torch.arange(min(config.num_classes, 10)).repeat_interleave(8)
    _, codes, pixels = zip(*draw_batches(config, machine, tokenizer, model, labels, range(len(labels))), strict=True)
    return torch.cat(codes), to_float(torch.cat(pixels)).unflatten(0, (-1, 8))

def draw_images(path, config, machine, tokenizer, model, labels, num_tokens=None):
    """A memory-mapped file of one image a label, drawn by all processes with prepare_sampling(): records of `image`
    (uint8, S x S x 3) and `label`."""
    side = decoder_size(tokenizer.config, num_tokens or config.num_tokens)
    prepare_sampling(tokenizer, model, machine, config.compile)

    def work(todo):
        for rows, _, pixels in draw_batches(config, machine, tokenizer, model, labels, todo, num_tokens):
            yield rows, {"image": pixels.permute(0, 2, 3, 1), "label": labels[rows]}

    return fill_file(path, [("image", "u1", (side, side, 3)), ("label", "i4")], machine, len(labels), work)

# == 15. Stage one: the tokenizer ======================================================================================

def loss_networks(config, machine, model):
    """Perceptual loss, SigLIP 2 and discriminator, None where not wanted; also gives the tokenizer its pretrained
    start."""
    path = functools.partial(published, folder=config.weights)
    perceptual = tower = disc = None
    if config.perceptual_weight:
        require(config.perceptual != "own" or config.num_classes > 1, "--perceptual own wants at least two classes to "
                "tell apart (--perceptual-weight 0 does without)", config.num_classes)
        perceptual = (ClassFeatures(config.num_classes) if config.perceptual == "own"
                      else wrap(LPIPS(path(VGG), path(LPIPS_LINEAR)), config, machine)).to(machine.device)
    if config.align_weight:
        tower = siglip_tower(path(SIGLIP), 27).to(machine.device)
        side, width = config.dec_patch_size if config.dynamic_prob else config.image_size, len(tower.norm.weight)
        require(side % tower.p == 0 and config.teacher_width == width, f"first-token alignment takes teacher_width "
                f"{width}, image sides that are multiples of {tower.p}", f"{config.teacher_width}, {side}")
        tower = wrap(tower, config, machine)
    if config.disc_weight:
        disc = PatchDiscriminator(config.image_size) if config.disc == "patch" else DinoDiscriminator(
            wrap(Dino(path(DINO)).to(machine.device), config, machine))
        if machine.device.type == "cuda":
            disc = nn.SyncBatchNorm.convert_sync_batchnorm(disc)
        disc.to(machine.device)
    if config.enc_init == "siglip2":
        require(config.enc_heads == SIGLIP_HEADS, f"with SigLIP 2 enc_heads must be {SIGLIP_HEADS}", config.enc_heads)
        with blame(f"the encoder can't start from {SIGLIP}"):
            model.encoder.load_state_dict(siglip_tower(path(SIGLIP), config.enc_depth).state_dict())
    return perceptual, tower, disc

def train_features(config, machine, net, images):
    """Teach ClassFeatures the classes of the training images. Every process does all of it, and all get the same."""
    alone, steps = machine._replace(rank=0, world=1), math.ceil(config.perceptual_images / config.tok_batch)
    rate = 2e-3
    optimizers = Optimizers(net, "adamw", rate)
    machine.say(f"perceptual: a small network learns to tell the classes, {steps} steps")
    batches = training_batches(config, alone, images, 0, steps)
    for step, x, labels, keys in tqdm(batches, "perceptual", steps, disable=True if machine.rank else None):
        with machine.autocast():
            logits = net.classify(diff_augment(x, keys[:1], fold(keys, 6), weak=True))      # (b, classes)
        backward(F.cross_entropy(logits.float(), labels))
        optimizers.step(learning_rate(step, steps, steps // 10, rate, 0, 0))
    if machine.world > 1:
        for tensor in net.state_dict().values():            # a GPU's sums are not always the same
            dist.broadcast(tensor, 0)

def best_prefix(config):
    """For each decoder size the longest of its prefixes, whose R(n) is closest to it: {size: n}, ascending."""
    return {decoder_size(config, n): n for n in prefix_lengths(config)}                     # of each, the last n stays

def draw_prefix(config, key):
    """How a step is trained, from a key (1,) -> the side of its images, how many tokens encode them, how many of these
    its coarse images decode, and a number in [0, 1) that rounds how many images are coarse. With probability
    dynamic_prob all are shrunk to one of the decoder's sizes, and encoded by as many tokens as that size is worth."""
    side, count = config.image_size, config.num_tokens
    rounding, where, dynamic, small = uniform(key, 4)[0].tolist()
    if dynamic < config.dynamic_prob:
        least, wanted = config.causal_num + config.group_size, config.min_size + small * (side - config.min_size)
        sizes = {size: n for size, n in best_prefix(config).items() if size >= config.min_size and n >= least}
        side = min(sizes, key=lambda size: abs(size - wanted))
        count = sizes[side]
    n = 1 + int(where * (count - config.group_size))                                        # 1..count-G, rounded up:
    return side, count, min(length for length in prefix_lengths(config) if length >= n), rounding

def split_batch(config, images, keys, count, prefix, rounding):
    """This process's images (b, 3, S, S) of a step, and their keys (b,), in parts -> [(images, keys, tokens to decode),
    ...]. The first coarse_prob of them, rounded up or down, decode `prefix` tokens, the others all `count`: some in
    every step, as whole batches of one prefix, now and then, made `cifar10` in small unlearn detail (1 dB worse)."""
    accum, parts = config.grad_accum, []
    coarse = accum * int(config.coarse_prob * len(images) / accum + rounding)
    for rows, n in ((slice(coarse), prefix), (slice(coarse, None), count)):
        pairs = zip(images[rows].chunk(accum), keys[rows].chunk(accum), strict=True)
        parts += [(x, x_keys, n) for x, x_keys in pairs if len(x)]
    return parts

def train_tokenizer(config, machine):
    """Train OUT/tokenizer.pt, or go on with it, up to tok_steps steps. Raises Refused."""
    out, device = Path(config.out), machine.device
    train = open_data(config, machine, "train", share=config.crop)
    val = open_data(config, machine, "val", classes=train.classes)
    about = {"classes": train.classes, "images": len(train)}
    torch.manual_seed(config.seed)
    model = Tokenizer(config).to(device)
    with machine.first():                                   # rank 0 downloads what is missing
        perceptual, tower, disc = loss_networks(config, machine, model)
    own = perceptual if config.perceptual == "own" else None
    ema = copy.deepcopy(model).requires_grad_(False) if config.tok_ema else None
    optimizers = Optimizers(model, config.optimizer, config.tok_lr)
    disc_optimizers = disc and Optimizers(disc, "adamw", config.tok_lr, betas=disc.BETAS)
    parts = {"model": model, "ema": ema, "disc": disc, **optimizers.parts}
    parts |= {"disc_adamw": disc and disc_optimizers.parts["adamw"], "perceptual": own}
    groups = ("data", "tokenizer", "tokenizer training", "training")
    start = resume(out / "tokenizer.pt", config, "tokenizer", groups, about, parts)
    machine.say(f"tokenizer: {sum(p.numel() for p in model.parameters()):,} parameters, {len(train)} images, "
                f"step {start} of {config.tok_steps}")
    if start >= config.tok_steps:
        return
    if own and start == 0:
        train_features(config, machine, own, train)
    if own:
        own.eval().requires_grad_(False)
    distributed, distributed_disc = wrap(model, config, machine), disc and wrap(disc, config, machine)
    progress = Progress(config, machine, "tokenizer", start, config.tok_steps, config.tok_batch)

    for step, images, _, keys in training_batches(config, machine, train, start, config.tok_steps):
        low = 0.1 * config.tok_lr
        lr = learning_rate(step, config.tok_steps, config.tok_warmup, config.tok_lr, low, low)
        adversarial = disc is not None and step + 1 >= config.disc_start
        side, count, short, rounding = draw_prefix(config, fold(root_key(config.seed, "prefix"), step))    # all alike
        disc_key = fold(root_key(config.seed, "disc"), step).to(device, non_blocking=True)

        # The tokenizer: decode a prefix or all, clean and corrected, against the image at the prefix's resolution.
        # L = |out - target|^2 + L_code + ramp perceptual(out, target) - w_align cos(guess, SigLIP 2) - w_disc D(out)
        values, results = {}, []
        for x, x_keys, prefix in split_batch(config, resize(images, side), keys, count, short, rounding):
            share = len(x) / len(images)                                                    # of this process's images
            spoilt_start, ranks = draw_noise(config, x_keys, prefix)
            target = x if prefix == count else degrade(x, config, prefix)                   # (b, 3, S, S)
            with machine.autocast():
                made = distributed(x, prefix, spoilt_start, ranks, count)
                copies = len(made.pixels) // len(x)                                         # 2 if self-corrected
                target = target.repeat(copies, 1, 1, 1)
                image_keys = torch.cat([fold(x_keys, 1 + i) for i in range(copies)])        # (copies b,)
                losses = {"pixel_loss": F.mse_loss(made.pixels, target), "vq_loss": made.vq_loss}
                if perceptual:
                    ramp = config.perceptual_weight * min(1, (step + 1) / perceptual.RAMP)
                    losses["perceptual_loss"] = ramp * perceptual(made.pixels, target[:len(x)], image_keys).mean()
                if tower:
                    losses["align_loss"] = config.align_weight * alignment_loss(made.guess, tower, x)
                if adversarial:
                    losses["adv_loss"] = config.disc_weight * disc.adversarial_loss(
                        made.pixels, target, disc_key, image_keys)
            backward(share * sum(losses.values()))
            model.quantizer.track(made.codes, machine)
            values = {k: values.get(k, 0) + share * v.detach() for k, v in losses.items()}
            results.append((made.latents, image_keys, target, made.pixels.detach(), share))
        values["grad_norm"] = optimizers.step(lr)
        if config.revive_every and step % config.revive_every == 0 and step < 0.6 * config.tok_steps:
            key = root_key(config.seed, f"revive {step}").to(device)
            model.quantizer.revive(torch.cat([latents for latents, *_ in results]), key, machine)
        update_ema(ema, model, config.tok_ema, step)
        values["usage"], values["perplexity"] = model.quantizer.usage()

        # The discriminator: tell targets from decoded images.
        if adversarial:
            disc.zero_grad()                                # the tokenizer's step may have left gradients in it
            for _, image_keys, target, pixels, share in results:
                with machine.autocast():
                    scores = distributed_disc(target, pixels, fold(disc_key, 1), image_keys)
                disc_loss = disc.loss(scores, config.disc_weight, machine, share)
                backward(disc_loss)
                values["disc_loss"] = values.get("disc_loss", 0) + disc_loss.detach()
            values["disc_grad_norm"] = disc_optimizers.step(disc.RATE or lr)

        done = step + 1
        if progress.step(done, lr, **values):               # a checkpoint is due
            if machine.rank == 0 and not progress.leaving:  # (then there may be little time)
                picture = reconstructions(ema or model, examples(val, machine))
                save_picture(picture, out / f"tokenizer_{done:07d}.png")
            progress.save(done, about, parts)

# == 16. Stage two: the AR transformer, on codes that are extracted once ===============================================

def load_tokenizer(config, machine):
    """OUT/tokenizer.pt, which must have the present settings, and its class names; or the one that --tokenizer names,
    whose settings then apply, for whatever classes: None. Raises Refused."""
    path = Path(config.tokenizer or Path(config.out) / "tokenizer.pt")
    tokenizer, about = load_model(path, "tokenizer", machine.device)
    for name in (f.name for f in fields(Config) if f.metadata["group"] == "tokenizer" or f.name == "image_size"):
        old, new = getattr(tokenizer.config, name), getattr(config, name)
        require(config.tokenizer or old == new, f"{path} was trained with {name} {old}: the settings must say so", new)
        setattr(config, name, old)
    config.noise_topk = tokenizer.config.noise_topk
    replace(config)                                         # (checks that the settings go together)
    return tokenizer, None if config.tokenizer else about.get("classes")

def extract_codes(config, machine, tokenizer, images):
    """Codes of the training images, in a memory-mapped file that is made when missing, named by what went into it (but
    for the pictures themselves: whoever changes these, but not their number, must delete it). One record per image: its
    label, and codes (views, 3, N): clean, shown, targets. Views: for folders, ten crops of a 1.1 times larger image, as
    the authors do; for the built-in sets, of the image with `shift` pixels of its reflection on each side, or if
    `shift` is 0 just the image and its mirror image."""
    shift = config.shift if config.data in BUILT_IN else 0
    views = 10 if shift or config.data not in BUILT_IN else 2
    made_of = short_hash(tokenizer, images.classes, len(images), config.data, config.image_size, config.seed,
                         shift, tokenizer.config.noise_topk, tokenizer.config.correction)
    path = Path(config.out) / f"codes-{made_of}.npy"

    def work(todo):
        for rows, pixels in images.in_order(todo, max(1, config.eval_batch // views)):
            x = F.pad(to_float(pixels.to(machine.device)), (shift,) * 4, "reflect")
            x = torch.cat((x, x.flip(3)) if views == 2 else TF.ten_crop(x, config.image_size))      # (views b, 3, R, R)
            place = torch.tensor(rows) * views + torch.arange(views)[:, None]                       # (views, b)
            keys = fold(root_key(config.seed, "codes"), place.flatten()).to(machine.device)
            with machine.autocast():
                triples = tokenizer.triples(x, keys).unflatten(0, (views, -1))                      # (views, b, 3, N)
            yield rows, {"codes": triples.transpose(0, 1), "label": images.labels[rows]}

    record = [("label", "i4"), ("codes", "u2", (views, 3, config.num_tokens))]      # u2: V is at most 65,536
    codes = fill_file(path, record, machine, len(images), work)
    if machine.rank == 0:
        for other in set(path.parent.glob("codes-*")) - {path}:     # of another tokenizer
            other.unlink()
    machine.say(f"codes: {len(images)} images x {views} views in {path}")
    return codes

def ar_batch(config, machine, codes, step):
    """This process's share of a step: labels (b,), codes to show (b, N), codes to predict (b, N), keys (b,).
    A random view of each image. With probability correction_share the sequence has a spoilt group: shown with it, the
    transformer must predict the clean codes there and the repaired ones after. So it learns to recover from errors."""
    rows, keys = batch_rows(config, machine, "ar", step, config.ar_batch, len(codes))
    records, u = codes[rows.numpy()], uniform(fold(keys, 0), 2)
    view = (u[:, 0] * records["codes"].shape[1]).long().numpy()
    triples = torch.from_numpy(records["codes"][np.arange(len(rows)), view].astype(np.int64))       # (b, 3, N)
    corrected = u[:, 1, None, None] < config.correction_share                                       # (b, 1, 1)
    shown, target = torch.where(corrected, triples[:, 1:], triples[:, :1]).unbind(1)                # (b, N) each
    labels = torch.from_numpy(records["label"].astype(np.int64))
    return [t.to(machine.device, non_blocking=True) for t in (labels, shown, target, keys)]

@torch.no_grad()
def val_loss(config, machine, tokenizer, model, images, most):
    """Mean cross-entropy in nats of each position, on up to `most` images spread over the set: (N,)."""
    total, rows = 0, range(0, len(images), math.ceil(len(images) / most))
    for part, pixels in images.in_order(rows, config.eval_batch):
        with machine.autocast():
            codes = tokenizer.encode(to_float(pixels.to(machine.device)))
            logits = model(images.labels[part].to(machine.device), codes)
        total = total + F.cross_entropy(logits.transpose(1, 2), codes, reduction="none").sum(0)
    return total / len(rows)

def train_ar(config, machine):
    """Train OUT/ar.pt on the codes of OUT/tokenizer.pt, or go on with it, up to ar_steps steps. Raises Refused."""
    out, (tokenizer, classes) = Path(config.out), load_tokenizer(config, machine)
    side = config.image_size if config.data in BUILT_IN else int(1.1 * config.image_size)
    images = open_data(config, machine, "train", side=side, classes=classes)
    about = {"classes": images.classes, "images": len(images), "tokenizer": short_hash(tokenizer)}
    torch.manual_seed(config.seed)
    model = ARTransformer(config).to(machine.device)
    if config.codebook_start:
        model.start_from(tokenizer.quantizer.lookup(torch.arange(config.codebook_size)))
    ema = copy.deepcopy(model).requires_grad_(False) if config.ar_ema else None
    optimizers = Optimizers(model, config.optimizer, config.ar_lr, config.ar_weight_decay)
    parts = {"model": model, "ema": ema, **optimizers.parts}
    groups = ("data", "tokenizer", "AR transformer", "AR training", "training")
    start = resume(out / "ar.pt", config, "ar", groups, about, parts)
    machine.say(f"ar: {sum(p.numel() for p in model.parameters()):,} parameters, step {start} of {config.ar_steps}; "
                f"a blind guess has loss ln V = {math.log(config.codebook_size):.3f}")
    if start >= config.ar_steps:
        return
    codes = extract_codes(config, machine, tokenizer, images)
    val = open_data(config, machine, "val", classes=images.classes)
    distributed = wrap(model, config, machine)
    progress = Progress(config, machine, "ar", start, config.ar_steps, config.ar_batch)

    for step in range(start, config.ar_steps):
        first, last = 0.005 * config.ar_lr, 0.01 * config.ar_lr
        lr = learning_rate(step, config.ar_steps, config.ar_warmup, config.ar_lr, first, last, config.ar_warmup)
        batch, mean_loss = ar_batch(config, machine, codes, step), 0
        # L = - mean over i of log p(target_i | class, what is shown of earlier groups; for i < c: of earlier codes)
        for labels, shown, target, keys in zip(*(t.chunk(config.grad_accum) for t in batch), strict=True):
            with machine.autocast():
                logits = distributed(labels, shown, keys)                                   # (b, N, V)
            loss = F.cross_entropy(logits.flatten(0, 1), target.flatten()) / config.grad_accum
            backward(loss)
            mean_loss = mean_loss + loss
        norm = optimizers.step(lr)
        update_ema(ema, model, config.ar_ema, step)

        done = step + 1
        if progress.step(done, lr, loss=mean_loss, grad_norm=norm):
            if machine.rank == 0 and not progress.leaving:
                value = val_loss(config, machine, tokenizer, ema or model, val, 512).mean().item()
                progress.write(done, {"val_loss": value}, f"held-out loss {value:.4f}")
                save_picture(samples(config, machine, tokenizer, ema or model)[1], out / f"ar_{done:07d}.png")
                (ema or model).cache = [None]               # gigabytes at the paper's scale
            progress.save(done, about, parts)

# == 17. Frechet Inception Distance ====================================================================================

def tf_resize(images, size=299):
    """TensorFlow 1's bilinear resize, which published FIDs are made with: (B, 3, H, W) float -> (B, 3, size, size).
    Output i lies at i * in / out, without the half pixel that others add, and is clamped at the edge."""
    for _ in "rows", "columns":
        length = images.shape[2]
        place = torch.arange(size, device=images.device, dtype=torch.float64) * length / size
        low, share = place.long(), place.frac()[:, None].to(images.dtype)
        images = images[:, :, low].lerp(images[:, :, (low + 1).clamp(max=length - 1)], share).mT
    return images

class InceptionV3(nn.Module):
    """The network of FID: torchvision's Inception v3 with the weights of 2015, the file WEIGHTS[INCEPTION], and the
    pooling they came with. Raises Refused when it is another."""
    def __init__(self, weights):
        super().__init__()
        self.net = torchvision.models.inception.Inception3(1008, aux_logits=False, init_weights=False)
        with blame(f"{weights} does not hold FID's Inception", f": get {WEIGHTS[INCEPTION][0]}"):
            self.net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        for name, block in self.net.named_children():
            if hasattr(block, "branch_pool"):                   # averages leave the padding out
                pool = nn.MaxPool2d(3, 1, 1) if name == "Mixed_7c" else nn.AvgPool2d(3, 1, 1, count_include_pad=False)
                block.register_forward_pre_hook(lambda block, args: setattr(block, "seen", args[0]))
                block.branch_pool.register_forward_pre_hook(lambda _, args, block=block, pool=pool: pool(block.seen))
        self.fc, self.net.fc = self.net.fc, nn.Identity()
        self.eval().requires_grad_(False)

    def forward(self, images):
        """uint8 (B, 3, H, W) -> pool features (B, 2048) and logits (B, 1008), float32. Raises Refused."""
        require(images.dtype == torch.uint8, "Inception wants uint8: FID is defined on 8-bit pictures", images.dtype)
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with torch.autocast(images.device.type, enabled=False), exact:
            features = self.net((tf_resize(images.float()) - 128) / 128)
            return features, self.fc(features)

SPLIT = 5000                        # images to one Inception Score; the mean over splits is the result

def moments(config, machine, inception, count, read, change=lambda pixels: pixels):
    """Of change(pixels) for the `count` images that read(row numbers, batch) yields, (some rows, uint8 (B, 3, H, W)):
    mean (2048,), covariance (2048, 2048) with divisor n - 1, Inception Score. Sums: float64, over all processes."""
    if count < 2048:
        machine.say(f"warning: FID of {count} images is not comparable: it takes 2,048, better 50,000")
    zeros = functools.partial(torch.zeros, dtype=torch.float64, device=machine.device)
    rows, splits = range(count)[machine.rank::machine.world], math.ceil(count / SPLIT)
    total, outer, p_sum, entropy = zeros(2048), zeros(2048, 2048), zeros(splits, 1008), zeros(splits)
    hidden = True if machine.rank else None             # None: shown on a terminal only
    for part, pixels in tqdm(read(rows, config.eval_batch), "Inception", leave=False, disable=hidden):
        features, logits = inception(change(pixels.to(machine.device)))
        f, p = features.double(), (logits - inception.fc.bias).double().softmax(-1)     # the score leaves the bias out
        total += f.sum(0)
        outer += f.T @ f
        split = torch.tensor(part, device=f.device) // SPLIT
        p_sum.index_add_(0, split, p)
        entropy.index_add_(0, split, torch.special.entr(p).sum(-1))
    for each in (total, outer, p_sum, entropy):
        machine.total(each)
    mean, size = total / count, p_sum.sum(-1)               # of each split: an image's probabilities sum to 1
    covariance = (outer - count * torch.outer(mean, mean)) / (count - 1)
    p = p_sum / size[:, None]
    score = (torch.special.entr(p).sum(-1) - entropy / size).exp().mean()               # exp E KL(p(y|x) || p(y))
    return mean.cpu(), covariance.cpu(), score.item()

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of two Gaussians, float64. Raises Refused if sizes differ.
    tr (S1 S2)^(1/2) sums the roots of the eigenvalues of S1 S2. Those of the symmetric S1^(1/2) S2 S1^(1/2) are the
    same, real and not negative, also where a matrix square root turns complex or wrong."""
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(x, dtype=torch.float64) for x in (mu1, sigma1, mu2, sigma2))
    for mu, sigma in ((mu1, sigma1), (mu2, sigma2)):
        check(mu, "a mean", (mu1.numel(),))
        check(sigma, "a covariance", (mu1.numel(), mu1.numel()))
        require(torch.allclose(sigma, sigma.T), "covariances must be symmetric", "one that is not")
    values, vectors = torch.linalg.eigh(sigma1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ sigma2 @ root).clamp(min=0).sqrt().sum()
    return ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross).item()

# == 18. Evaluation ====================================================================================================

def psnr(a, b):
    """Peak signal-to-noise ratio in dB, each image by itself, of 8-bit roundings: (B, 3, S, S) twice -> (B,)."""
    error = (to_uint8(a).float() - to_uint8(b).float()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(255**2 / error.clamp(min=1e-3))

@torch.no_grad()
def measure_tokenizer(config, machine, tokenizer, images, most=2000):
    """PSNR by prefix length, codebook use, and whether self-correction corrects -> {name: number}."""
    lengths = {*strip_lengths(config), config.num_tokens // 4, config.num_tokens // 2} & {*prefix_lengths(config)}
    rows, found, counts = range(0, len(images), math.ceil(len(images) / most)), defaultdict(list), 0
    for part, pixels in images.in_order(rows, config.eval_batch):
        x = to_float(pixels.to(machine.device))
        codes = tokenizer.encode(x)
        counts = counts + codes.flatten().bincount(minlength=config.codebook_size)
        for n in sorted(lengths):               # against the full image; at the size that is decoded
            y = tokenizer.decode(codes[:, :n])
            found[f"psnr_{n}_tokens"].append(psnr(resize(y, x.shape[-1]), x))
            found[f"psnr_{n}_tokens_at_{y.shape[-1]}px"].append(psnr(y, resize(x, y.shape[-1])))
        keys = fold(root_key(config.seed, "eval"), torch.tensor(part)).to(machine.device)
        start, ranks = draw_noise(tokenizer.config, keys, config.num_tokens)
        if start is not None:
            _, kept, corrected = (psnr(y, x) for y in spoil(tokenizer, x, start, ranks))
            found["psnr_spoilt_rest_kept"].append(kept)
            found["psnr_spoilt_rest_corrected"].append(corrected)
    p = counts / counts.sum()
    return {"images": len(rows), **{name: round(torch.cat(each).mean().item(), 3) for name, each in found.items()},
            "codebook_usage": round((counts > 0).float().mean().item(), 4),
            "codebook_perplexity": round(torch.special.entr(p).sum().exp().item(), 1)}

@torch.no_grad()
def measure_fid(config, machine, tokenizer, model, inception, val):
    """Reconstruction FID (validation images), generation FID and Inception Score, with all that defines them."""
    measured = functools.partial(moments, config, machine, inception)

    def rebuild(pixels):
        with machine.autocast():
            return to_uint8(tokenizer.decode(tokenizer.encode(to_float(pixels))))

    def drawn(rows, batch):
        return ((part, torch.tensor(file["image"][part]).permute(0, 3, 1, 2)) for part in chunks(rows, batch))

    if config.reference:
        with blame(f"--reference {config.reference} is no npz with mu and sigma"), np.load(config.reference) as stored:
            reference, whose = [torch.from_numpy(stored[name]) for name in ("mu", "sigma")], config.reference
            check(reference[0], "mu", (2048,))
            check(reference[1], "sigma", (2048, 2048))
    else:
        train = open_data(config, machine, "train")
        reference, whose = measured(len(train), train.in_order)[:2], f"{len(train)} training images of {config.data}"
    truth, copies = measured(len(val), val.in_order), measured(len(val), val.in_order, rebuild)
    settings, models = sampling_settings(config), [short_hash(tokenizer), short_hash(model)]
    made_of = short_hash(models, settings, config.seed, config.eval_samples, str(machine.dtype))
    file = draw_images(Path(config.out) / f"samples-{made_of}.npy", config, machine, tokenizer, model,
                       torch.arange(config.eval_samples) % config.num_classes)
    mean, covariance, score = measured(len(file), drawn)
    return {"reconstruction_fid": round(frechet_distance(*copies[:2], *truth[:2]), 4),
            "generation_fid": round(frechet_distance(mean, covariance, *reference), 4),
            "inception_score": round(score, 3),
            "protocol": {"inception_sha256": hashlib.sha256(Path(config.inception).read_bytes()).hexdigest(),
                         "resize": "TensorFlow 1 bilinear, 299 px", "statistics": "float64",
                         "reconstruction_reference": f"{len(val)} validation images", "generation_reference": whose,
                         "samples": config.eval_samples, "classes": "balanced", "seeds": f"{config.seed} + i",
                         "weights": [tokenizer.weights_of, model.weights_of], "dtype": str(machine.dtype),
                         "models": models, **settings}}

def draw_curves(config, found, loss):
    """What a run shows in curves, as pictures in OUT; `found` from measure_tokenizer, loss by position."""
    out, lengths, G = Path(config.out), prefix_lengths(config), config.group_size
    save_plot(out / "resolution.png", "side in pixels that n tokens explain", {
        "R(n)": [(n, resolution(config, n)) for n in lengths],
        "decoded at": [(n, decoder_size(config, n)) for n in lengths]})
    save_plot(out / "passes.png", "passes of the transformer to draw n tokens", {
        "one by one": [(n, n) for n in lengths],
        f"groups of {G}": [(n, len(decoding_spans(config, n))) for n in lengths]})
    save_plot(out / "psnr.png", "PSNR in dB of the image decoded from n tokens", {
        "held-out": [(n, found[f"psnr_{n}_tokens"]) for n in lengths if f"psnr_{n}_tokens" in found]})
    save_plot(out / "ar_loss.png", "loss in nats of code i", {
        "each": list(enumerate(loss)),
        "mean of its group": [(i, np.mean(loss[i // G * G:][:G])) for i in range(len(loss))]})
    records = read_log(out / "log.jsonl")
    for stage, names in (("tokenizer", ("pixel_loss", "vq_loss")), ("ar", ("loss", "val_loss"))):
        curves = {name: [(r["step"], r[name]) for r in records if r["stage"] == stage and name in r] for name in names}
        if all(curves.values()):
            save_plot(out / f"{stage}_losses.png", f"{stage}: loss by step", curves)

def evaluate(config, machine):
    """Measure OUT/tokenizer.pt and OUT/ar.pt, or others given -> OUT/results.json and pictures. Raises Refused."""
    out, (tokenizer, _), say = Path(config.out), load_tokenizer(config, machine), machine.say
    model, classes = load_ar(config.ar or out / "ar.pt", tokenizer, machine.device)
    config.num_classes, G = model.config.num_classes, config.group_size
    val = open_data(config, machine, "val", classes=classes)
    found = measure_tokenizer(config, machine, tokenizer, val)
    loss = val_loss(config, machine, tokenizer, model, val, 2000).tolist()
    groups = {f"loss_codes_{i}_to_{i + G - 1}": sum(loss[i:i + G]) / G for i in range(0, len(loss), G)}
    results = {"command": sys.argv, "torch": torch.__version__, "device": str(machine.device),
               "config": asdict(config), "tokenizer": found,
               "ar": {"ln_V": math.log(config.codebook_size), "loss": sum(loss) / len(loss), **groups}}
    for part in ("tokenizer", "ar"):
        say("\n".join(f"{part:>10s}  {name:30s} {value:.6g}" for name, value in results[part].items()))
    if "psnr_spoilt_rest_kept" in found:
        say(f"self-correction: one group spoilt {found['psnr_spoilt_rest_kept']:.2f} dB, "
            f"with all later groups encoded again {found['psnr_spoilt_rest_corrected']:.2f} dB")
    if machine.rank == 0:
        pixels = examples(val, machine)
        codes, rows = samples(config, machine, tokenizer, model)
        save_picture(rows, out / "samples.png")
        save_picture(coarse_to_fine(tokenizer, codes[::8]), out / "coarse_to_fine.png")
        save_picture(reconstructions(tokenizer, pixels), out / "reconstructions.png")
        if tokenizer.config.correction:
            save_picture(repairs(tokenizer, pixels), out / "self_correction.png")
        draw_curves(config, found, loss)
        say(f"pictures: {', '.join(sorted(map(str, out.glob('*[a-z].png'))))}")
    inception = None
    try:
        require(config.inception != "none", "it takes Inception's weights, --inception auto or FILE", "none")
        if config.inception == "auto":
            with machine.first():
                config.inception = str(published(INCEPTION, config.weights))
        inception = InceptionV3(config.inception).to(machine.device)
    except Refused as reason:
        say(f"FID: not measured: {reason}")
    if machine.total(torch.tensor(float(inception is not None), device=machine.device)) == machine.world:
        results["fid"] = measure_fid(config, machine, tokenizer, model, inception, val)
        say(json.dumps(results["fid"], indent=1))
    elif inception:
        say("FID: not measured: another process has no Inception weights")
    if machine.rank == 0:
        with written_whole(out / "results.json") as file:
            file.write(json.dumps(results, indent=1).encode())

# == 19. Benchmark: how fast, and how far from what the machine allows =================================================

def weight_bytes(module):
    return sum(p.nbytes for p in module.parameters())

class Bench:
    """Times work and prints a JSON line for each: median seconds, images/s, and the share reached of the floor: the
    larger of its bytes over the machine's copy bandwidth and its operations over the machine's matmul rate."""
    def __init__(self, machine):
        self.machine, self.gpu, like = machine, machine.device.type == "cuda", {"device": machine.device}
        big, n = torch.ones(2, 2**26, **like), 8192 if self.gpu else 2048
        self.bandwidth = big.nbytes / self.seconds(lambda: big[0].copy_(big[1]))[0]     # 256 MB read, as many written
        square, layer = torch.rand(n, n, dtype=machine.dtype, **like), nn.Linear(n, n, dtype=machine.dtype, **like)
        if not self.gpu and machine.dtype == torch.float32:                             # the fastest there is
            pack_linear(layer)
        with torch.no_grad():
            self.rate = 2 * n**3 / min(self.seconds(lambda: square @ square)[0], self.seconds(lambda: layer(square))[0])
        self.say(gpu=torch.cuda.get_device_name() if self.gpu else None, threads=torch.get_num_threads(),
                 torch=torch.__version__, dtype=str(machine.dtype), copy_GB_per_s=self.bandwidth / 1e9,
                 matmul_TFLOP_per_s=self.rate / 1e12)

    def say(self, **record):
        self.machine.say(json.dumps({k: float(f"{v:.4g}") if type(v) is float else v for k, v in record.items()}))

    def seconds(self, work):
        """Median time of three, and that of the first call, which compiles and warms up; the device waited for."""
        times = [time.perf_counter()]
        for _ in range(4):
            work()
            if self.gpu:
                torch.cuda.synchronize()
            times.append(time.perf_counter())
        first, *others = np.diff(times).tolist()
        return sorted(others)[1], first

    def run(self, what, batch, work, moved, **more):
        """Time work(), which makes `batch` images and has to move at least `moved` bytes -> did it fit in memory?"""
        packed_flops = {PACKED_LINEAR: lambda x, w, *rest, **more: 2 * math.prod(x) * w[0]}
        counted = FlopCounterMode(display=False, custom_mapping=packed_flops)
        try:
            with counted, torch.compiler.set_stance("force_eager"):
                work()
            if self.gpu:
                torch.cuda.reset_peak_memory_stats()
            median, first = self.seconds(work)
        except torch.OutOfMemoryError:
            self.say(what=what, batch=batch, failed="does not fit into the GPU's memory")
            return False
        unit = 1 if sys.platform == "darwin" else 1024          # ru_maxrss, the most so far, is in KiB but on a Mac
        peak = torch.cuda.max_memory_allocated() if self.gpu else unit * resource.getrusage(0).ru_maxrss
        flops = counted.get_total_flops()
        self.say(what=what, batch=batch, seconds=median, first_seconds=first, images_per_s=batch / median,
                 gflop=flops / 1e9, roofline_share=max(moved / self.bandwidth, flops / self.rate) / median,
                 peak_GB=peak / 1e9, **more)
        return True

    def train(self, what, batch, module, kind, loss):
        """Time a step of training; its optimiser reads and writes weights, gradients and moments."""
        optimizers = Optimizers(module, kind, 0.0)

        def step():
            with self.machine.autocast():
                value = loss()
            value.backward()
            optimizers.step(0.0)

        self.run(f"train {what}", len(batch), step, 10 * weight_bytes(module))

def random_models(config, machine):
    """A tokenizer and an AR transformer of the settings' sizes to time, without training or checkpoint."""
    tokenizer, model = (kind(config).to(machine.device).eval() for kind in (Tokenizer, ARTransformer))
    nn.init.normal_(model.output.weight, std=0.02)          # zero at first, which draws nothing but ties
    return tokenizer.requires_grad_(False), model.requires_grad_(False)

def bench_sampling(bench, tokenizer, model, batches):
    """Tokens and pixels apart, for each batch size; a pass reads all weights but the table of codes."""
    machine, config = bench.machine, model.config
    passes = len(decoding_spans(config, config.num_tokens))
    prepare_sampling(tokenizer, model, machine, config.compile)
    moved = passes * (weight_bytes(model) - weight_bytes(model.code_embed))
    for batch in batches:                               # up to the largest that fits
        torch.compiler.reset()                          # it gives up on a function that it has met in too many shapes
        draw = functools.partial(generate, model, torch.arange(batch) % config.num_classes, seeds=torch.arange(batch),
                                 **sampling_settings(config))
        codes = torch.randint(config.codebook_size, (batch, config.num_tokens), device=machine.device)
        paint = functools.partial(tokenizer.decode, codes)
        with machine.autocast():
            if not (bench.run("sample: codes", batch, draw, moved, passes=passes)
                    and bench.run("sample: pixels", batch, paint, weight_bytes(tokenizer.decoder))):
                break

def benchmark(config, machine):
    """Time drawing, then with random weights and data, the networks alone, a step of each stage, with and without
    self-correction, and the extraction of codes."""
    bench, R, N, device = Bench(machine), config.image_size, config.num_tokens, machine.device
    batches = (1, 16, 256, 1024, 4096) if bench.gpu else (1, 4, config.eval_batch)
    bench_sampling(bench, *random_models(config, machine), batches)
    torch.compiler.reset()                              # frees the memory of CUDA graphs
    tokenizer, model = Tokenizer(config).to(device), ARTransformer(config).to(device)
    run_tokenizer, run_model = wrap(tokenizer, config, machine), wrap(model, config, machine)
    images = torch.rand(config.tok_batch // machine.world, 3, R, R, device=device) * 2 - 1
    codes = torch.randint(config.codebook_size, (config.ar_batch // machine.world, N), device=device)
    tok_keys, ar_keys = (torch.arange(len(x), device=device) for x in (images, codes))

    def tokenizer_loss(*noise):
        out = run_tokenizer(images, N, *noise)
        return out.pixels.square().mean() + out.vq_loss

    def ar_loss():
        logits = run_model(codes[:, 0] % config.num_classes, codes, ar_keys)
        return F.cross_entropy(logits.flatten(0, 1), codes.flatten())

    spoilt_loss = functools.partial(tokenizer_loss, *draw_noise(config, tok_keys, N))
    bench.train("tokenizer, with self-correction", images, tokenizer, config.optimizer, spoilt_loss)
    bench.train("tokenizer, without self-correction", images, tokenizer, config.optimizer, tokenizer_loss)
    bench.train("AR transformer", codes, model, config.optimizer, ar_loss)
    with machine.autocast():
        extract = functools.partial(tokenizer.triples, images, tok_keys)
        bench.run("extract codes", len(images), extract, weight_bytes(tokenizer.encoder))

# == 20. Command line ==================================================================================================

def parse(argv):
    """The command line -> (Config, stage, table). Every field of Config is a flag; a preset changes the defaults."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     usage="detailflow.py [--preset NAME] [--stage NAME] [--SETTING VALUE ...]")
    parser.add_argument("--preset", choices=PRESETS, default="shapes", help="settings that the flags override [shapes]")
    stages = "all", "tokenizer", "ar", "eval", "bench"
    parser.add_argument("--stage", choices=stages, default="all", help="what to do; all: the next three [all]")
    parser.add_argument("--table", action="store_true", help="print the resolution mapping R(n) and stop")
    for title, members in itertools.groupby(fields(Config), lambda f: f.metadata["group"]):
        group = parser.add_argument_group(title)
        for f in members:
            kind = {"type": f.type, "metavar": f.type.__name__}
            kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else kind
            text = f.metadata["help"] + ("" if f.default == "" else " [%(default)s]")
            group.add_argument("--" + f.name.replace("_", "-"), default=f.default, help=text, **kind)
    preset, _ = parser.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    parser.set_defaults(**PRESETS[preset.preset])
    values = vars(parser.parse_args(argv))
    stage, table, name = (values.pop(k) for k in ("stage", "table", "preset"))
    return Config(**values | {"out": values["out"] or f"runs/{name}"}), stage, table

def run_stages(config, stage):
    """Do what was asked for, alone in the folder: two runs would spoil each other. Raises Refused."""
    machine, out = start_machine(config), Path(config.out)
    for name in ("inception", "reference"):
        path = getattr(config, name)
        require(path in ("", "none", "auto") or Path(path).is_file(), f"--{name} must be a file", path)
    for batch in ("tok_batch", "ar_batch"):
        parts, size = machine.world * config.grad_accum, getattr(config, batch)
        require(size % parts == 0, f"{batch} must be a multiple of processes x grad_accum = {parts}", size)
    if config.data in BUILT_IN:
        config.num_classes = BUILT_IN[config.data]
    elif stage != "bench":
        config.num_classes = len(Folder(config.data, "train", config.image_size).classes)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as file:                          # the lock goes when we do, however
        if machine.rank == 0:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)    # unlike flock's, no worker inherits it
            except (BlockingIOError, PermissionError) as error:
                raise Refused(f"another run is at work in {out}: wait for it, or choose another --out") from error
            except OSError as error:                                # some clusters' file systems have no locks
                machine.say(f"warning: {out} can't be locked ({error.strerror}): start no second run there")
        stages = {"tokenizer": train_tokenizer, "ar": train_ar, "eval": evaluate, "bench": benchmark}
        for name in ("tokenizer", "ar", "eval") if stage == "all" else (stage,):
            given = getattr(config, name, "")                       # then there is none to train
            require(not given or stage == "all", f"--stage {name} must not be given --{name}", given)
            if not given:
                stages[name](config, machine)

def guarded(program, job, after_all="the same command goes on from the last checkpoint"):
    """Run a program's job() -> exit status: 0, 2 for a user's mistake, a folder that can't be made, a full disk or
    memory, 130 or 143 when interrupted; a line says why. Raises what else goes wrong: a bug of ours. Under torchrun a
    process that fails does not return: it exits, with this status."""
    def interrupt(number, frame):
        """In training after the step; elsewhere, and at a second Ctrl-C, at once. (A cluster may say SIGTERM twice.)"""
        if Progress.asked is None or (Progress.asked and number == signal.SIGINT):
            raise KeyboardInterrupt("interrupted", number)
        Progress.asked = number

    Progress.asked, handlers = None, {n: signal.signal(n, interrupt) for n in (signal.SIGINT, signal.SIGTERM)}
    status = 1
    try:
        job()
        status = 0
    except (Refused, OSError, MemoryError, RuntimeError) as error:
        lines, runtime = str(error).strip().splitlines() or ["out of memory"], isinstance(error, RuntimeError)
        if runtime and not re.search("out of memory|allocate|DataLoader worker|shared memory", lines[0]):
            raise
        text = lines[0] if runtime else re.sub(r"^[\w.]*Refused: ", "", lines[-1])      # a worker's has a traceback
        print(f"{program}: {text}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt as error:
        text, number = error.args or ("interrupted", signal.SIGINT)
        print(f"\n{program}: {text}; {after_all}", file=sys.stderr)
        status = 128 + number               # as shells report it
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if dist.is_initialized():
            if status == 0:
                dist.destroy_process_group()
            else:                           # that would wait for others, who wait for us
                if status == 1:
                    traceback.print_exc()
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(status)
    return status

def main(argv=None):
    """Run the command line -> exit status, see guarded()."""
    def job():
        config, stage, table = parse(sys.argv[1:] if argv is None else argv)
        if not table:
            return run_stages(config, stage)
        print("tokens n   R(n)  decoded at (pixels)")
        for n in prefix_lengths(config):
            print(f"{n:8d} {resolution(config, n):6d} {decoder_size(config, n):6d}")

    return guarded("detailflow", job)

if __name__ == "__main__":
    sys.exit(main())
