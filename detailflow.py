"""DetailFlow in one file."""
import argparse
import contextlib
import copy
import functools
import hashlib
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchvision.transforms import functional as TF
from tqdm import tqdm


class Refused(ValueError):
    """A user's mistake. main() prints its one line, without a traceback, and exits with status 2."""


# ======================================================================================================
# 1. Randomness as a function
# ======================================================================================================
# Every random number in this file is a pure function of (seed, what it is for, which sample it is for):
# nothing is drawn from a stream whose state would have to be kept. Hence, for free: a killed run goes on
# as if never stopped, two GPUs train like one, and image i looks the same in a batch of 1 or of 64.
# The function is the finaliser of splitmix64, a bijection on 64-bit integers with well mixed output.

GOLDEN, MIX_1, MIX_2 = (c - 2**64 for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def mix(z):
    """Scramble int64 tensor z, element by element. (The masks turn torch's signed shift into an unsigned one.)"""
    z = (z ^ ((z >> 30) & (2**34 - 1))) * MIX_1
    z = (z ^ ((z >> 27) & (2**37 - 1))) * MIX_2
    return z ^ ((z >> 31) & (2**33 - 1))


def fold(keys, number):
    """New int64 keys from old ones and a number (int, or int64 tensor): one key for each purpose or sample."""
    number = torch.full_like(keys, number) if isinstance(number, int) else number
    return mix(keys + (number + 1) * GOLDEN)


def uniform(keys, count):
    """`count` float32 numbers in [0, 1) for each key: (B,) int64 -> (B, count)."""
    counter = torch.arange(1, count + 1, device=keys.device) * GOLDEN
    return ((mix(keys[:, None] + counter) >> 40) & 0xFFFFFF).float() * 2**-24


def root_key(seed, purpose):
    """The int64 key, shape (1,), that belongs to a seed and a purpose named by a string."""
    return fold(torch.tensor([seed]), int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:6], "big"))


# ======================================================================================================
# 2. Settings
# ======================================================================================================

def setting(group, default, help):
    return field(default=default, metadata={"group": group, "help": help})


@dataclass
class Config:
    """Every setting with its default (the `shapes` preset) and its help text; the command line is made from this.

    Raises Refused when settings are impossible, on their own or together.
    """
    out: str = setting("run", "", "folder for checkpoints, logs and pictures (default: runs/PRESET)")
    seed: int = setting("run", 0, "seed of everything: weights, order of images, augmentation, samples")
    device: str = setting("run", "auto", "auto, cpu, cuda or cuda:N")
    dtype: str = setting("run", "auto", "auto (bfloat16 on CUDA, else float32), float32 or bfloat16")
    compile: bool = setting("run", False, "torch.compile the transformer blocks")
    workers: int = setting("run", 4, "processes that decode image files")
    log_every: int = setting("run", 50, "steps between two lines of the log")
    save_every: int = setting("run", 250, "steps between two checkpoints")
    picture_every: int = setting("run", 500, "steps between two pictures")

    data: str = setting("data", "shapes", "shapes (drawn by the program), cifar10 (downloaded), or a folder of images in class "
                     "folders, with or without train/ and val/ above them")
    image_size: int = setting("data", 32, "side of the square images, in pixels")
    num_classes: int = setting("data", 10, "classes; taken from the data when training")
    crop: float = setting("data", 0.8, "folders only: a training crop shows at least this share of the shorter side; 1: centre")

    num_tokens: int = setting("tokenizer", 32, "N, tokens per image")
    group_size: int = setting("tokenizer", 4, "G, tokens that are drawn in one pass")
    causal_num: int = setting("tokenizer", -1, "c, first tokens that are drawn one by one: a multiple of G; -1: G itself")
    alpha: float = setting("tokenizer", 1.5, "exponent of the resolution mapping R(n)")
    patch_size: int = setting("tokenizer", 4, "side of a patch in pixels")
    codebook_size: int = setting("tokenizer", 512, "V, codes in the codebook")
    code_dim: int = setting("tokenizer", 8, "C, dimension of a code")
    enc_width: int = setting("tokenizer", 96, "encoder width")
    enc_depth: int = setting("tokenizer", 3, "encoder layers")
    enc_heads: int = setting("tokenizer", 3, "encoder attention heads")
    enc_mlp: int = setting("tokenizer", 0, "encoder MLP width; 0: four times the width")
    dec_width: int = setting("tokenizer", 96, "decoder width")
    dec_depth: int = setting("tokenizer", 3, "decoder layers")
    dec_heads: int = setting("tokenizer", 3, "decoder attention heads")
    dec_mlp: int = setting("tokenizer", 0, "decoder MLP width; 0: four times the width")

    tok_steps: int = setting("tokenizer training", 1500, "optimiser steps")
    tok_batch: int = setting("tokenizer training", 64, "images per step, over all processes")
    tok_accum: int = setting("tokenizer training", 1, "parts into which a process splits its batch to save memory")
    tok_lr: float = setting("tokenizer training", 1e-3, "peak learning rate")
    tok_warmup: int = setting("tokenizer training", 100, "steps of linear warm-up")
    tok_ema: float = setting("tokenizer training", 0.995, "decay of the averaged weights; 0: no averaging")
    coarse_prob: float = setting("tokenizer training", 0.2, "share of batches that train a random prefix against the degraded image")
    correction: bool = setting("tokenizer training", True, "self-correction training")
    noise_topk: int = setting("tokenizer training", 50, "self-correction replaces a code by one of this many nearest ones")
    commit_weight: float = setting("tokenizer training", 0.25, "weight beta of the commitment loss")
    disc_weight: float = setting("tokenizer training", 0.0, "weight of the adversarial loss; 0: no discriminator")
    disc_start: int = setting("tokenizer training", 40000, "step at which the adversarial loss starts")

    ar_width: int = setting("AR transformer", 160, "width")
    ar_depth: int = setting("AR transformer", 4, "layers")
    ar_heads: int = setting("AR transformer", 4, "attention heads")
    dropout: float = setting("AR transformer", 0.1, "dropout of tokens, residuals and feed-forward outputs")
    class_dropout: float = setting("AR transformer", 0.1, "share of labels replaced by the null class, for guidance")

    ar_steps: int = setting("AR training", 1500, "optimiser steps")
    ar_batch: int = setting("AR training", 64, "sequences per step, over all processes")
    ar_accum: int = setting("AR training", 1, "parts into which a process splits its batch to save memory")
    ar_lr: float = setting("AR training", 1e-3, "peak learning rate")
    ar_warmup: int = setting("AR training", 75, "steps of linear warm-up")
    ar_ema: float = setting("AR training", 0.995, "decay of the averaged weights; 0: no averaging")
    ar_weight_decay: float = setting("AR training", 0.05, "weight decay of matrices and embeddings")
    correction_share: float = setting("AR training", 0.3, "share of training sequences that come from self-correction")

    guidance: float = setting("sampling", 1.5, "classifier-free guidance scale; 1: none, and half the work")
    schedule: str = setting("sampling", "constant", "guidance over the groups: constant or linear (decreasing)")
    temperature: float = setting("sampling", 1.0, "sampling temperature; 0: always the likeliest code")
    top_k: int = setting("sampling", 0, "sample among the k likeliest codes; 0: all")
    top_p: float = setting("sampling", 1.0, "sample among the likeliest codes that together reach this probability")

    eval_samples: int = setting("evaluation", 2000, "images generated to measure FID")
    eval_batch: int = setting("evaluation", 250, "images per batch in evaluation and token extraction")
    inception: str = setting("evaluation", "none", "FID's Inception weights: a file, auto (download once, 95 MB) or none (no FID)")
    reference: str = setting("evaluation", "", "npz with mu and sigma to compare generated images with; default: training set")

    def __post_init__(self):
        self.causal_num = self.group_size if self.causal_num == -1 else self.causal_num
        self.enc_mlp, self.dec_mlp = self.enc_mlp or 4 * self.enc_width, self.dec_mlp or 4 * self.dec_width
        for f in fields(self):
            value = getattr(self, f.name)
            if type(value) is int and f.type is float:
                setattr(self, f.name, value := float(value))
            if type(value) is not f.type:
                raise Refused(f"{f.name} must be {f.type.__name__}, got {value!r}")
            if f.type is float and not math.isfinite(value):
                raise Refused(f"{f.name} must be a finite number, got {value}")
        at_least = {name: 1 for name in (
            "image_size num_classes group_size patch_size code_dim enc_width enc_depth enc_heads enc_mlp dec_width dec_depth "
            "dec_heads dec_mlp tok_steps tok_batch tok_accum noise_topk ar_width ar_depth ar_heads ar_steps ar_batch ar_accum "
            "log_every save_every picture_every eval_samples eval_batch").split()}
        at_least |= {name: 0 for name in (
            "workers causal_num tok_lr tok_warmup tok_ema coarse_prob commit_weight disc_weight disc_start dropout class_dropout "
            "ar_lr ar_warmup ar_ema ar_weight_decay correction_share guidance temperature top_k top_p seed").split()}
        at_least |= {"num_tokens": 2, "codebook_size": 2}
        for name, low in at_least.items():
            if getattr(self, name) < low:
                raise Refused(f"{name} must be at least {low}, got {getattr(self, name)}")
        for name in "coarse_prob correction_share".split():
            if getattr(self, name) > 1:
                raise Refused(f"{name} is a share and must be at most 1, got {getattr(self, name)}")
        for name in "tok_ema ar_ema dropout class_dropout".split():
            if getattr(self, name) >= 1:
                raise Refused(f"{name} must be less than 1, got {getattr(self, name)}")
        N, G, c = self.num_tokens, self.group_size, self.causal_num
        for bad, reason in (
            (N % G, f"num_tokens {N} is not a multiple of group_size {G}"),
            (c % G, f"causal_num {c} is not a multiple of group_size {G}"),
            (c + G > N, f"num_tokens {N} leaves no group after the first {c} tokens: it must be at least {c + G}"),
            (self.image_size % self.patch_size, f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"),
            (self.enc_width % self.enc_heads, f"enc_width {self.enc_width} is not a multiple of enc_heads {self.enc_heads}"),
            (self.dec_width % self.dec_heads, f"dec_width {self.dec_width} is not a multiple of dec_heads {self.dec_heads}"),
            (self.ar_width % (4 * self.ar_heads), f"ar_width {self.ar_width} is not a multiple of 4 * ar_heads {self.ar_heads} "
             "(the rotary positions need it)"),
            (self.codebook_size > 65536, f"codebook_size {self.codebook_size} is above 65536, what two bytes can hold"),
            (self.noise_topk > self.codebook_size, f"noise_topk {self.noise_topk} is above codebook_size {self.codebook_size}"),
            (self.alpha <= 0, f"alpha must be above 0, got {self.alpha}"),
            (not 0 < self.crop <= 1, f"crop must be above 0 and at most 1, got {self.crop}"),
            (not 0 < self.top_p <= 1, f"top_p must be above 0 and at most 1, got {self.top_p}"),
            (self.schedule not in ("constant", "linear"), f"schedule must be constant or linear, got {self.schedule}"),
            (self.dtype not in ("auto", "float32", "bfloat16"), f"dtype must be auto, float32 or bfloat16, got {self.dtype}"),
        ):
            if bad:
                raise Refused(reason)


PAPER = dict(  # Section 4.1 and the authors' code; 1,281,167 images, batch 256: one epoch is 5,004 steps
    image_size=256, num_classes=1000, group_size=8, patch_size=16, codebook_size=8192, inception="auto", eval_samples=50000,
    enc_width=1152, enc_depth=12, enc_heads=16, enc_mlp=4304, dec_width=768, dec_depth=12, dec_heads=12, ar_width=1024,
    ar_depth=24, ar_heads=16, tok_steps=250 * 5004, tok_batch=256, tok_lr=1e-4, tok_warmup=5004, tok_ema=0.0, disc_weight=0.2,
    ar_steps=300 * 5004, ar_batch=256, ar_lr=1e-4, ar_warmup=15 * 5004, ar_ema=0.9999, compile=True, workers=12,
    log_every=100, save_every=5000, picture_every=5000)

PRESETS = {
    "shapes": {},
    "cifar10": dict(
        data="cifar10", num_tokens=64, group_size=8, codebook_size=4096, enc_width=384, enc_depth=6, enc_heads=6, dec_width=384,
        dec_depth=6, dec_heads=6, tok_steps=12000, tok_batch=512, tok_lr=5e-4, tok_warmup=500, tok_ema=0.999, disc_weight=0.2,
        disc_start=6000, ar_width=512, ar_depth=12, ar_heads=8, ar_steps=12000, ar_batch=512, ar_lr=5e-4, ar_warmup=600,
        ar_ema=0.999, compile=True, inception="auto", eval_samples=50000, save_every=1000, picture_every=1000),
    "imagenet-16": PAPER | dict(num_tokens=128, guidance=1.45),
    "imagenet-32": PAPER | dict(num_tokens=256, guidance=1.5),
    "imagenet-64": PAPER | dict(num_tokens=512, guidance=1.32),
}


# ======================================================================================================
# 3. Resolution mapping: how many pixels n tokens are worth (paper, Section 3.2)
# ======================================================================================================

def prefix_lengths(config):
    """The token counts that can be decoded: 1, 2, ..., c (drawn one by one), then whole groups up to N."""
    c, G, N = config.causal_num, config.group_size, config.num_tokens
    return [*range(1, c + 1), *range(c + G, N + 1, G)]


def resolution(config, n):
    """R(n), the side in pixels that the first n tokens are to explain: R(1) = 1, R(N) = R.

    R(n) = R - (R - 1) / (N - 1)^alpha * (N - n)^alpha, cut to an integer (the authors' code; the paper is silent).
    alpha > 1 rises fast at first: few tokens buy the layout, most are spent on detail.
    """
    R, N = config.image_size, config.num_tokens
    slope = (R - 1) / (N - 1) ** config.alpha
    return min(max(int(R - slope * (N - n) ** config.alpha), 1), R)


def decoder_size(config, n):
    """Side of the image that the decoder paints from n tokens: R(n) rounded up to whole patches."""
    return math.ceil(resolution(config, n) / config.patch_size) * config.patch_size


def best_prefix(config):
    """For each decoder size the token count whose R(n) is closest to it (the longer of two equals): {size: n}."""
    best = {}
    for n in prefix_lengths(config):
        size = decoder_size(config, n)
        if size not in best or abs(resolution(config, n) - size) <= abs(resolution(config, best[size]) - size):
            best[size] = n
    return best


def degrade(images, config, n):
    """The target for n tokens: (B, 3, R, R) in [-1, 1] -> (B, 3, S, S) with S = decoder_size(n).

    Area-averaged down to R(n), so that no more than n tokens' worth of detail is left, then bicubic up to what
    the decoder paints. The target of the first token is the mean colour. All N tokens: the image itself.
    """
    low, size = resolution(config, n), decoder_size(config, n)
    if low != images.shape[-1]:
        images = F.interpolate(images, size=(low, low), mode="area")
    if size != low:
        images = F.interpolate(images, size=(size, size), mode="bicubic", align_corners=False)
    return images


def resolution_table(config):
    lines = ["tokens n   R(n)   decoded at"]
    return "\n".join(lines + [f"{n:8d}{resolution(config, n):7d}{decoder_size(config, n):10d} px" for n in prefix_lengths(config)])


# ======================================================================================================
# 4. The one mask (bool, True = may attend; the same for the encoder's queries and for the AR transformer)
# ======================================================================================================

def group_causal_mask(length, causal_num, group_size):
    """(T, T) bool: row i says what position i may attend to.

    The first c positions see what came before them and themselves; later ones see every group up to the
    whole of their own: nothing in a group waits for its neighbours. T = 6, c = 2, G = 2:

        0 | 1 . . . . .        c = 2: one by one
        1 | 1 1 . . . .
        2 | 1 1 1 1 . .        group 1, both at once
        3 | 1 1 1 1 . .
        4 | 1 1 1 1 1 1        group 2
        5 | 1 1 1 1 1 1
    """
    i, j = torch.arange(length)[:, None], torch.arange(length)[None]
    return torch.where(i < causal_num, j <= i, j // group_size <= i // group_size)


# ======================================================================================================
# 5. Vision transformer (SigLIP 2's block, for the encoder and the decoder)
# ======================================================================================================

def split_heads(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)                                      # (B, h, T, D/h)


class Block(nn.Module):
    """Pre-norm transformer layer: attention, then a tanh-GELU MLP."""

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

    def keys_values(self, x):
        """What later tokens need of x (B, T, D) to attend to it: two tensors (B, h, T, D/h)."""
        weight, bias = self.qkv.weight, self.qkv.bias
        kv = F.linear(self.norm1(x), weight[x.shape[-1]:], bias[x.shape[-1]:])
        return tuple(split_heads(t, self.heads) for t in kv.chunk(2, dim=-1))

    def forward(self, x, past=None, mask=None):
        """x (B, T, D) attends to itself and to `past`, the keys and values of P earlier tokens; mask (T, P + T).

        Returns the new x and the keys and values of its own T tokens.
        """
        q, k, v = (split_heads(t, self.heads) for t in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        own = (k, v)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)            # (B, h, P + T, D/h)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate="tanh")), own


class ViT(nn.Module):
    """Layers, final norm, and a table of learned positions for a grid x grid image."""

    def __init__(self, width, depth, heads, mlp, grid):
        super().__init__()
        self.grid = grid
        self.positions = nn.Parameter(torch.randn(grid * grid, width) / math.sqrt(width))
        self.blocks = nn.ModuleList(Block(width, heads, mlp) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def position_grid(self, rows, columns):
        """Positions of a rows x columns image, resized from the table when that is of another size: (rows * columns, D)."""
        if rows == columns == self.grid:
            return self.positions
        table = self.positions.unflatten(0, (self.grid, self.grid)).permute(2, 0, 1)[None]   # (1, D, g, g)
        table = F.interpolate(table, size=(rows, columns), mode="bilinear", align_corners=False, antialias=True)
        return table[0].flatten(1).T


def patchify(images, p):
    """(B, 3, H, W) -> (B, H/p * W/p, p * p * 3): row by row, and inside a patch row, column, channel."""
    x = images.unflatten(2, (-1, p)).unflatten(4, (-1, p))                                   # (B, 3, h, p, w, p)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(x, p):
    """The inverse of patchify, for square images."""
    side = math.isqrt(x.shape[1])
    x = x.unflatten(1, (side, side)).unflatten(3, (p, p, 3))                                 # (B, h, w, p, p, 3)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


# ======================================================================================================
# 6. Vector quantiser
# ======================================================================================================

class Quantized(NamedTuple):
    vectors: torch.Tensor   # (B, T, C) unit vectors of the codebook, gradients straight through to the input
    codes: torch.Tensor     # (B, T)    int64
    latents: torch.Tensor   # (B, T, C) the normalised input
    error: torch.Tensor     # (B, T)    codebook loss + beta * commitment loss


class Quantizer(nn.Module):
    """Nearest neighbour on the unit sphere: l2-normalised latents against l2-normalised codebook rows."""

    WINDOW = 65536                                    # codes over which usage and perplexity are taken

    def __init__(self, codebook_size, code_dim, commit_weight):
        super().__init__()
        self.commit_weight = commit_weight
        self.codebook = nn.Parameter(F.normalize(torch.randn(codebook_size, code_dim), dim=-1))
        self.register_buffer("counts", torch.zeros(codebook_size))

    def lookup(self, codes):
        return F.normalize(self.codebook[codes], dim=-1)                                     # (..., C)

    @torch.no_grad()
    def nearest(self, latents, k):
        """The k nearest codes of each latent (..., C), nearest first: (..., k).

        On the sphere |z - e|^2 = 2 - 2 z.e, so the nearest code is the one with the largest cosine.
        """
        similarity = latents @ F.normalize(self.codebook, dim=-1).T                          # (..., V)
        return similarity.topk(k, dim=-1).indices if k > 1 else similarity.argmax(dim=-1, keepdim=True)

    def forward(self, latents):
        """(B, T, C) -> Quantized. Always in float32: under bfloat16 near ties would be decided at random."""
        with torch.autocast(latents.device.type, enabled=False):
            z = F.normalize(latents.float(), dim=-1)
            codes = self.nearest(z, 1)[..., 0]
            e = self.lookup(codes)
            error = (e - z.detach()).square().mean(-1) + self.commit_weight * (e.detach() - z).square().mean(-1)
            return Quantized(z + (e - z).detach(), codes, z, error)

    @torch.no_grad()
    def track(self, codes):
        """Remember which codes were used, with a memory of about WINDOW codes."""
        ones = torch.ones(codes.numel(), device=codes.device)
        self.counts.mul_(1 - min(codes.numel() / self.WINDOW, 1)).index_add_(0, codes.flatten(), ones)

    def usage(self):
        """Share of codes seen lately, and perplexity: exp(entropy), the number of codes in effective use."""
        p = self.counts / self.counts.sum().clamp(min=1)
        return (self.counts > 0.5).float().mean(), torch.special.entr(p).sum().exp()


# ======================================================================================================
# 7. Tokenizer: encoder, self-correction, decoder (paper, Sections 3.1 to 3.3)
# ======================================================================================================

class Correction(NamedTuple):
    vectors: torch.Tensor   # (B, N, C) clean prefix, noisy group (both without gradient), re-encoded rest
    codes: torch.Tensor     # (B, N) the same as codes: what the AR transformer is shown ("input")
    labels: torch.Tensor    # (B, N) what it shall predict: clean codes up to the end of the noise, then the re-encoded
    error: torch.Tensor     # (B, N) quantisation error of the re-encoded tokens, 0 elsewhere
    redone: torch.Tensor    # (B, N) bool, True where a token was re-encoded


class TokenizerOutput(NamedTuple):
    pixels: torch.Tensor    # (B or 2B, 3, S, S) decoded prefix: clean sequences, then corrected ones
    code_loss: torch.Tensor # scalar: codebook and commitment loss
    codes: torch.Tensor     # (B, N) clean codes


class Tokenizer(nn.Module):
    """Image <-> N codes, coarse to fine: the first n codes decode to the image at resolution R(n)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        N, C, D, E, p = config.num_tokens, config.code_dim, config.enc_width, config.dec_width, config.patch_size
        grid = config.image_size // p
        self.patch_embed = nn.Linear(3 * p * p, D)
        self.encoder = ViT(D, config.enc_depth, config.enc_heads, config.enc_mlp, grid)
        self.queries = nn.Parameter(0.02 * torch.randn(1, N, D))          # ask the image for token i
        self.retry_queries = nn.Parameter(0.02 * torch.randn(1, N, D))    # ask again, knowing what went wrong before
        self.query_positions = nn.Parameter(0.02 * torch.randn(1, N, D))
        self.to_code = nn.Linear(D, C)
        self.from_code = nn.Linear(C, D)                                  # a given code as a query (self-correction)
        self.quantizer = Quantizer(config.codebook_size, C, config.commit_weight)
        self.code_embed = nn.Linear(C, E)
        self.code_positions = nn.Parameter(0.02 * torch.randn(1, N, E))
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, E))
        self.decoder = ViT(E, config.dec_depth, config.dec_heads, config.dec_mlp, grid)
        self.to_pixels = nn.Linear(E, 3 * p * p)
        self.register_buffer("mask", group_causal_mask(N, config.causal_num, config.group_size), persistent=False)

    # ---- encoder: patches never see the queries, so their side of every layer is computed once and kept ----

    def encode_patches(self, images):
        """(B, 3, H, W) in [-1, 1] -> the patches' keys and values in each layer: all that queries need of an image."""
        p = self.config.patch_size
        x = self.patch_embed(patchify(images, p))                                            # (B, P, D)
        x = x + self.encoder.position_grid(images.shape[2] // p, images.shape[3] // p)
        past = []
        for block in self.encoder.blocks[:-1]:
            x, keys_values = block(x)
            past.append(keys_values)
        return past + [self.encoder.blocks[-1].keys_values(x)]    # the last layer's own output nobody reads

    def encode_queries(self, queries, past):
        """Queries (B, T, D) read the image: each sees all patches and the queries that the mask allows -> (B, T, C)."""
        T, P = queries.shape[1], past[0][0].shape[2]
        x = queries + self.query_positions[:, :T]
        mask = torch.cat([self.mask.new_ones(T, P), self.mask[:T, :T]], dim=1)               # (T, P + T)
        for block, keys_values in zip(self.encoder.blocks, past):
            x, _ = block(x, keys_values, mask)
        return self.to_code(self.encoder.norm(x))

    def quantize(self, past):
        """The clean pass: N learned queries -> Quantized."""
        B, N = past[0][0].shape[0], self.config.num_tokens
        return self.quantizer(self.encode_queries(self.queries.expand(B, N, -1), past))

    # ---- self-correction ----

    def correct(self, past, clean, start, ranks):
        """Spoil one group, then let the encoder make the best of it (paper, Section 3.3).

        start (B,): where the noise begins: below c one token is spoilt, else a whole group. ranks (B, G) in
        0..noise_topk-1: which of its nearest codes each spoilt token becomes (0: stays clean). N = 8, G = c = 2,
        start = 2:

            tokens      0   1 | 2   3 | 4   5 | 6   7
            queries in  z0  z1  x2  x3  r4  r5  r6  r7      z clean, x noisy codes; r "retry" queries
            gradient     cut     cut   flows   flows
            vectors     z0  z1  x2  x3  z4' z5' z6' z7'     decodes to the image all the same: z' repairs x
            codes       the same as codes                   what the AR model may have sampled, ...
            labels      z0  z1  z2  z3  z4' z5' z6' z7'     ... and what it should then say
        """
        c, G, N = self.config.causal_num, self.config.group_size, self.config.num_tokens
        position, start = torch.arange(N, device=start.device)[None], start[:, None]         # (1, N), (B, 1)
        end = start + torch.where(start < c, 1, G)
        noisy, redone = (position >= start) & (position < end), position >= end              # (B, N)

        spots = (start + torch.arange(G, device=start.device)).clamp(max=N - 1)              # (B, G)
        latents = clean.latents.gather(1, spots[..., None].expand(-1, -1, clean.latents.shape[-1]))
        near = self.quantizer.nearest(latents, self.config.noise_topk)                       # (B, G, K)
        swapped = near.gather(2, ranks[..., None])[..., 0]                                   # (B, G)
        codes = torch.where(noisy, swapped.gather(1, (position - start).clamp(0, G - 1)), clean.codes)

        given = self.quantizer.lookup(codes).detach()                                        # no gradient into the past
        queries = torch.where(redone[..., None], self.retry_queries, self.from_code(given))
        again = self.quantizer(self.encode_queries(queries, past))
        return Correction(vectors=torch.where(redone[..., None], again.vectors, given),
                          codes=torch.where(redone, again.codes, codes),
                          labels=torch.where(redone, again.codes, clean.codes),
                          error=again.error * redone, redone=redone)

    # ---- decoder ----

    def decode_vectors(self, vectors, size):
        """Code vectors (B, n, C) -> pixels (B, 3, size, size), nominally in [-1, 1]: mask tokens read the codes."""
        n, side = vectors.shape[1], size // self.config.patch_size
        canvas = (self.mask_token + self.decoder.position_grid(side, side)).expand(len(vectors), -1, -1)
        x = torch.cat([canvas, self.code_embed(vectors) + self.code_positions[:, :n]], dim=1)
        for block in self.decoder.blocks:
            x, _ = block(x)                                                                  # (B, side^2 + n, E)
        return unpatchify(self.to_pixels(self.decoder.norm(x[:, :side * side])), self.config.patch_size)

    # ---- what others call ----

    def forward(self, images, prefix, start=None, ranks=None):
        """One training pass: the first `prefix` tokens of each image decoded, with self-correction if `start` is given."""
        past = self.encode_patches(images)
        clean = self.quantize(past)
        if start is None:
            vectors, code_loss = clean.vectors, clean.error.mean()
        else:
            fixed = self.correct(past, clean, start, ranks)
            vectors = torch.cat([clean.vectors, fixed.vectors])                              # (2B, N, C)
            # Mean over all tokens that were encoded: N in the first pass, those after the noise in the second.
            total = clean.error.sum(1) + fixed.error.sum(1)
            code_loss = (total / (self.config.num_tokens + fixed.redone.sum(1))).mean()
        pixels = self.decode_vectors(vectors[:, :prefix], decoder_size(self.config, prefix))
        return TokenizerOutput(pixels.float(), code_loss, clean.codes)

    @torch.no_grad()
    def encode(self, images):
        """(B, 3, H, W) float in [-1, 1], sides multiples of the patch -> codes (B, N) int64. Raises Refused."""
        p = self.config.patch_size
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise Refused(f"encode wants float images (B, 3, H, W) in [-1, 1], got {images.dtype} {tuple(images.shape)}")
        if images.shape[2] % p or images.shape[3] % p or 0 in images.shape:
            raise Refused(f"encode wants sides that are multiples of the patch size {p}, got {tuple(images.shape[2:])}")
        return self.quantize(self.encode_patches(images)).codes

    @torch.no_grad()
    def decode(self, codes, size=None):
        """Codes (B, n), n in prefix_lengths(config) -> (B, 3, S, S), nominally in [-1, 1]; S = size or decoder_size(n)."""
        if codes.ndim != 2 or codes.is_floating_point() or codes.shape[1] not in prefix_lengths(self.config):
            raise Refused(f"decode wants integer codes (B, n) with n one of {prefix_lengths(self.config)}, "
                          f"got {codes.dtype} {tuple(codes.shape)}")
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.config.codebook_size:
            raise Refused(f"codes must lie in 0..{self.config.codebook_size - 1}, got {int(codes.min())}..{int(codes.max())}")
        size = size or decoder_size(self.config, codes.shape[1])
        if size % self.config.patch_size:
            raise Refused(f"size {size} is not a multiple of the patch size {self.config.patch_size}")
        return self.decode_vectors(self.quantizer.lookup(codes.long()), size).float()

    @torch.no_grad()
    def triples(self, images, keys):
        """Clean, perturbed and label codes for the AR stage: (B, 3, R, R), keys (B,) -> (B, 3, N)."""
        past = self.encode_patches(images)
        clean = self.quantize(past)
        if not self.config.correction:
            return clean.codes[:, None].expand(-1, 3, -1)
        fixed = self.correct(past, clean, *draw_noise(self.config, keys, self.config.num_tokens))
        return torch.stack([clean.codes, fixed.codes, fixed.labels], dim=1)


def draw_prefix(config, key):
    """How many tokens a training batch decodes, from a (1,) key: N, or with probability coarse_prob fewer."""
    N, G, c = config.num_tokens, config.group_size, config.causal_num
    coarse, where = uniform(key, 2)[0].tolist()
    if coarse >= config.coarse_prob:
        return N
    n = 1 + int(where * (N - G))                                                             # 1..N-G
    return n if n <= c else math.ceil(n / G) * G


def draw_noise(config, keys, prefix):
    """Where and how each sample is spoilt: keys (B,) -> start (B,), ranks (B, G), both int64; or None, None.

    Never in the last group of the prefix, for nothing could repair it; a prefix of one token is left alone.
    """
    G, c = config.group_size, config.causal_num
    span = prefix if prefix <= c else prefix - G
    if not config.correction or prefix == 1 or span == 0:
        return None, None
    u = uniform(fold(keys, 0), 1 + G)
    start = (u[:, 0] * span).long()
    return torch.where(start < c, start, start // G * G), (u[:, 1:] * config.noise_topk).long()


# ======================================================================================================
# 8. Adversarial loss for the small presets (optional)
# ======================================================================================================

class PatchDiscriminator(nn.Module):
    """Small convolutional judge of 16 x 16 pixel neighbourhoods, with LeCam regularisation."""

    DECAY, LECAM = 0.999, 0.001

    def __init__(self, image_size, channels=64):
        super().__init__()
        self.image_size = image_size
        norm = nn.utils.parametrizations.spectral_norm
        self.net = nn.Sequential(
            norm(nn.Conv2d(3, channels, 4, 2, 1)), nn.LeakyReLU(0.2),
            norm(nn.Conv2d(channels, 2 * channels, 4, 2, 1)), nn.LeakyReLU(0.2),
            norm(nn.Conv2d(2 * channels, 4 * channels, 3, 1, 1)), nn.LeakyReLU(0.2),
            norm(nn.Conv2d(4 * channels, 1, 3, 1, 1)))
        self.register_buffer("anchors", torch.zeros(2))   # running means of real and fake scores

    def forward(self, images):
        """(B, 3, S, S) in [-1, 1] -> scores (B, 1, s, s). Images below full size (short prefixes) are enlarged first."""
        if images.shape[-1] < self.image_size:
            images = F.interpolate(images, size=(self.image_size,) * 2, mode="bilinear", align_corners=False)
        return self.net(images)

    def loss(self, real, fake):
        """Hinge loss of real and fake scores plus LeCam: real scores are held near the mean fake one and vice versa."""
        means = torch.stack([real.mean(), fake.mean()]).detach()
        if dist.is_initialized():
            dist.all_reduce(means, op=dist.ReduceOp.SUM)
            means /= dist.get_world_size()
        self.anchors.lerp_(means, 1 - self.DECAY)
        hinge = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
        lecam = F.relu(real - self.anchors[1]).square().mean() + F.relu(self.anchors[0] - fake).square().mean()
        return hinge + self.LECAM * lecam


# ======================================================================================================
# 9. AR transformer: first group token by token, every later group in one pass (paper, Section 3.4)
# ======================================================================================================
# Position p of the sequence predicts code p. What it is given, for N = 8, G = c = 2 ("s" is learned; it
# stands where a group's first position has a code to continue from and its other positions have none yet):
#
#     position    0      1      2      3      4      5      6      7
#     input     class  code 0 code 1   s    code 2 code 3 code 4 code 5
#     predicts  code 0 code 1 code 2 code 3 code 4 code 5 code 6 code 7
#     pass        1      2    |---- 3 ----| |---- 4 ----| |---- 5 ----|     G + N/G - 1 = 5 passes
#
# Within a pass codes are drawn independently: given what is before them, neighbours can't agree on a joint
# choice. What goes wrong there, later groups were trained to repair (self-correction, above).

def rotary_table(config):
    """(cos, sin) by position, (N, head_dim/2, 2): half of the pairs turn with the group, half with the place in it.

    Position p >= 1 holds group (p-1) // G, place (p-1) % G. Row 0, the class, is all ZERO, not (1, 0), as in the
    published models: its query and key vanish, so that all positions read the class with the same logit 0.
    """
    quarter = config.ar_width // config.ar_heads // 4
    frequency = 10000.0 ** -(torch.arange(quarter).float() / quarter)
    p = torch.arange(config.num_tokens - 1)
    group, place = (x.float()[:, None] * frequency for x in (p // config.group_size, p % config.group_size))
    angle = torch.cat([group, place], dim=1)                                                 # (N - 1, head_dim/2)
    return F.pad(torch.stack([angle.cos(), angle.sin()], dim=-1), (0, 0, 0, 0, 1, 0))


def rotate(x, table):
    """Turn the pairs (2i, 2i + 1) of x (B, h, T, d) by the angles of table (T, d/2, 2), in float32."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)                                       # (B, h, T, d/2)
    cos, sin = table.unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).type_as(x)


def dropout(x, rate, keys, site):
    """Dropout whose mask depends on each sample's key and the place in the network alone; no keys, no dropout."""
    if keys is None or rate == 0:
        return x
    keep = uniform(fold(keys, site), x[0].numel()).view_as(x) >= rate
    return x * keep / (1 - rate)


class ARBlock(nn.Module):
    """Llama layer: RMSNorm, rotary attention, SwiGLU; no biases."""

    def __init__(self, config, index):
        super().__init__()
        D = config.ar_width
        hidden = 256 * math.ceil(int(8 * D / 3) / 256)
        self.heads, self.rate, self.index = config.ar_heads, config.dropout, index
        self.norm1, self.norm2 = nn.RMSNorm(D, eps=1e-5), nn.RMSNorm(D, eps=1e-5)
        self.qkv, self.out = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
        self.w1, self.w3 = nn.Linear(D, hidden, bias=False), nn.Linear(D, hidden, bias=False)
        self.w2 = nn.Linear(hidden, D, bias=False)

    def forward(self, x, rotary, mask=None, cache=None, keys=None):
        """x (B, T, D) at the positions of rotary (T, d/2, 2). With a cache it attends to all that is kept there, too."""
        q, k, v = (split_heads(t, self.heads) for t in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        q, k = rotate(q, rotary), rotate(k, rotary)
        if cache is not None:
            k, v = cache.extend(self.index, k, v)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + dropout(self.out(y.transpose(1, 2).flatten(2)), self.rate, keys, 2 * self.index)
        h = self.norm2(x)
        return x + dropout(self.w2(F.silu(self.w1(h)) * self.w3(h)), self.rate, keys, 2 * self.index + 1)


class KVCache:
    """Keys and values of all positions so far, in buffers that are made once."""

    def __init__(self, model, batch):
        config, like = model.config, model.output.weight
        self.kv = like.new_empty(config.ar_depth, 2, batch, config.ar_heads, config.num_tokens,
                                 config.ar_width // config.ar_heads)
        self.length = 0     # positions filled by all layers; the caller moves it on after a pass

    def extend(self, layer, k, v):
        """Append the T new positions of a layer; returns its keys and values so far, (B, h, length + T, d)."""
        end = self.length + k.shape[2]
        self.kv[layer, 0, :, :, self.length:end] = k
        self.kv[layer, 1, :, :, self.length:end] = v
        return self.kv[layer, 0, :, :, :end], self.kv[layer, 1, :, :, :end]


class ARTransformer(nn.Module):
    """Predicts the N codes of an image from its class, coarse to fine."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        D, V = config.ar_width, config.codebook_size
        self.class_embed = nn.Embedding(config.num_classes + 1, D)       # the last row is the null class of guidance
        self.code_embed = nn.Embedding(V, D)
        self.blocks = nn.ModuleList(ARBlock(config, i) for i in range(config.ar_depth))
        self.norm = nn.RMSNorm(D, eps=1e-5)
        self.output = nn.Linear(D, V, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.output.weight)                               # the first loss is ln V
        self.specials = nn.Parameter(torch.randn(config.group_size - 1, D))   # std 1, as in the published models
        self.register_buffer("rotary", rotary_table(config), persistent=False)
        mask = group_causal_mask(config.num_tokens, config.causal_num, config.group_size)
        self.register_buffer("mask", mask, persistent=False)

    def embed(self, labels, codes, start=0):
        """Inputs of the positions from `start` on, when k codes are known: labels (B,), codes (B, k) -> (B, T, D).

        The layout drawn above: class, codes 0..c-1, G-1 specials, codes c, c+1, ... (specials only once k >= c).
        """
        c, G, (B, k) = self.config.causal_num, self.config.group_size, codes.shape
        parts = [self.class_embed(labels)[:, None]] if start == 0 else []
        parts += [self.code_embed(codes[:, max(start - 1, 0):c])]        # position p <= c holds code p-1
        if k >= c and start <= c:
            parts += [self.specials.expand(B, -1, -1).to(parts[-1].dtype)]
        if k > c:
            parts += [self.code_embed(codes[:, max(start - G, c):])]     # position p >= c + G holds code p-G
        return torch.cat(parts, dim=1)

    def run(self, x, start=0, cache=None, keys=None):
        """Layers and head for the positions start .. start+T-1: x (B, T, D) -> logits (B, T, V) float32.

        Without a cache all positions must be there (start = 0) and the mask orders them; with one, a pass holds one
        position or one group, which may see all that came before and itself: no mask is needed.
        """
        T = x.shape[1]
        mask = self.mask[:T, :T] if cache is None else None
        for block in self.blocks:
            x = block(x, self.rotary[start:start + T], mask, cache, keys)
        return self.output(self.norm(x)).float()

    def forward(self, labels, codes, keys=None):
        """labels (B,) in 0..num_classes, codes (B, N) -> logits (B, N, V) float32; position i predicts code i.

        keys (B,): one for each sample, for dropout in training. None: no dropout.
        """
        config = self.config
        if codes.ndim != 2 or codes.shape[1] != config.num_tokens or labels.shape != codes.shape[:1]:
            raise Refused(f"ARTransformer wants labels (B,) and codes (B, {config.num_tokens}), "
                          f"got {tuple(labels.shape)} and {tuple(codes.shape)}")
        if keys is not None:
            drop = uniform(fold(keys, -2), 1)[:, 0] < config.class_dropout
            labels = torch.where(drop, config.num_classes, labels)
        x = self.embed(labels, codes[:, :config.num_tokens - config.group_size])
        return self.run(dropout(x, config.dropout, keys, -3), keys=keys)


# ======================================================================================================
# 10. Generation: G + N/G - 1 passes, each over its new positions only
# ======================================================================================================

def decoding_spans(config, num_tokens):
    """The positions of each pass: [(0, 1), ..., (c-1, c), (c, c+G), (c+G, c+2G), ...], as far as num_tokens."""
    c, G = config.causal_num, config.group_size
    return [(i, i + 1) for i in range(min(c, num_tokens))] + [(i, i + G) for i in range(c, num_tokens, G)]


def guidance_scale(config, start, guidance, schedule):
    """Scale for the codes of the pass that begins at `start`.

    constant: the same for all. linear: full for the first c codes, then group i of K = N/G has
    guidance * (K - i + 1) / (K + 1), as the authors' "gradual" guidance: later groups are guided less.
    """
    if schedule == "constant" or start < config.causal_num:
        return guidance
    K = config.num_tokens // config.group_size
    return guidance * (K - start // config.group_size + 1) / (K + 1)


def filter_logits(logits, top_k=0, top_p=1.0):
    """Removed codes become -inf. First all below the k-th largest (ties stay), then, of the rest, all after the
    code with which the sorted probabilities pass top_p (that one stays)."""
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[..., -1:], -math.inf)
    if top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True)
        p = ordered.softmax(dim=-1)
        late = p.cumsum(dim=-1) - p > top_p                              # the sum before this code is enough already
        logits = logits.masked_fill(torch.zeros_like(late).scatter(-1, index, late), -math.inf)
    return logits


def draw_codes(logits, u, temperature=1.0, top_k=0, top_p=1.0):
    """Codes (B, T) from logits (B, T, V) and uniform numbers u (B, T), each position by itself; temperature 0: argmax.

    Inverse transform: the first code at which the cumulated probability passes u. One number a code makes
    image i depend on seed i alone, and the GPU need not tell the CPU anything between two passes.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = filter_logits(logits / temperature, top_k, top_p).softmax(dim=-1)
    total = probabilities.double().cumsum(dim=-1)
    threshold = (u.double() + 2**-25)[..., None] * total[..., -1:]       # u is a multiple of 2^-24: strictly inside
    return torch.searchsorted(total, threshold, right=True)[..., 0]


def check_request(config, labels, guidance, schedule, temperature, top_k, top_p, seeds, num_tokens):
    """Refuse impossible sampling settings with their value and what is allowed."""
    B, lowest, highest = len(labels), *(labels.aminmax() if len(labels) else (0, 0))
    for bad, reason in (
        (labels.ndim != 1 or labels.is_floating_point(), f"labels must be integers of shape (B,), got {labels.dtype} {tuple(labels.shape)}"),
        (B == 0, "labels must name at least one class"),
        (lowest < 0 or highest > config.num_classes, f"labels must lie in 0..{config.num_classes - 1}, "
         f"or be {config.num_classes} for no class; got {int(lowest)}..{int(highest)}"),
        (not 0 <= guidance < math.inf, f"guidance must be at least 0, got {guidance}"),
        (schedule not in ("constant", "linear"), f"schedule must be constant or linear, got {schedule}"),
        (not 0 <= temperature < math.inf, f"temperature must be at least 0, got {temperature}"),
        (top_k < 0 or top_k != int(top_k), f"top_k must be a whole number, 0 for all codes, got {top_k}"),
        (not 0 < top_p <= 1, f"top_p must be above 0 and at most 1, got {top_p}"),
        (seeds is not None and len(seeds) != B, f"seeds must be one for each of {B} labels, got {len(seeds or ())}"),
        (num_tokens not in prefix_lengths(config), f"num_tokens must be one of {prefix_lengths(config)}, got {num_tokens}"),
    ):
        if bad:
            raise Refused(reason)


@torch.no_grad()
def generate(model, labels, guidance=1.0, schedule="constant", temperature=1.0, top_k=0, top_p=1.0, seeds=None,
             num_tokens=None, slow=False):
    """Draw images: labels (B,) -> codes (B, N) int64, or the first num_tokens of them for a small picture sooner.

    seeds: one integer an image (default: fresh ones from torch's generator). Image i depends on its own label and seed
    only, not on its batch. slow=True recomputes every position in every pass, as the authors' code does: the reference.
    Raises Refused.
    """
    config, device = model.config, model.output.weight.device
    num_tokens = config.num_tokens if num_tokens is None else num_tokens
    check_request(config, labels, guidance, schedule, temperature, top_k, top_p, seeds, num_tokens)
    B, labels = len(labels), labels.to(device)
    seeds = torch.randint(2**62, (B,)) if seeds is None else torch.as_tensor(seeds)
    u = uniform(fold(seeds.to(device).long(), 0), config.num_tokens)                         # (B, N)
    guided = guidance != 1 or schedule == "linear"
    if guided:                                                                               # (2B,): with class, without
        labels = torch.cat([labels, torch.full_like(labels, config.num_classes)])
    codes = labels.new_zeros(len(labels), config.num_tokens)
    cache = None if slow else KVCache(model, len(labels))
    for start, end in decoding_spans(config, num_tokens):
        if slow:
            logits = model.run(model.embed(labels, codes[:, :start]))[:, start:]
        else:
            logits = model.run(model.embed(labels, codes[:, :start], start), start, cache)   # (B or 2B, end-start, V)
            cache.length = end
        if guided:
            with_class, without = logits.chunk(2)
            logits = without + (with_class - without) * guidance_scale(config, start, guidance, schedule)
        drawn = draw_codes(logits, u[:, start:end], temperature, top_k, top_p)
        codes[:, start:end] = drawn.repeat(2, 1) if guided else drawn
    return codes[:B, :num_tokens]


# ======================================================================================================
# 11. Data
# ======================================================================================================

CACHE = Path(torch.hub.get_dir()) / "detailflow"      # downloads; TORCH_HOME moves it
RESIDENT_BYTES = 2**30                                # sets up to this size are kept on the device as uint8


def to_float(pixels):
    """uint8 -> float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def to_uint8(images):
    """[-1, 1] -> uint8, rounded: to_uint8(to_float(x)) == x."""
    return (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8)


class Shapes(torch.utils.data.Dataset):
    """Ten classes of shapes, drawn by the program: item i is (uint8 image (3, size, size), label i % 10), always the same.

    Place, size, angle and colours are the coarse part; stripes and dots of few pixels the fine one.
    """
    classes = ("disc", "ring", "square", "frame", "triangle", "cross", "flower", "bar", "crescent", "pair")
    lengths = {"train": 20000, "val": 2000, "test": 2000}

    def __init__(self, split="train", size=32):
        if split not in self.lengths:
            raise Refused(f"split must be one of {', '.join(self.lengths)}, got {split!r}")
        self.size, self.length, self.key = size, self.lengths[split], root_key(0, split)

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if not 0 <= index < self.length:
            raise IndexError(f"shapes has {self.length} images, asked for number {index}")
        return self.draw(torch.tensor([index]))[0], index % 10

    def draw(self, indices):
        """(M,) -> uint8 (M, 3, size, size)."""
        u = uniform(fold(self.key, indices), 16)[..., None, None]                            # (M, 16, 1, 1)
        line = (torch.arange(self.size) + 0.5) / self.size
        y, x = line[:, None].expand(self.size, -1), line.expand(self.size, -1)               # (S, S) in 0..1
        radius = 0.26 + 0.14 * u[:, 0]
        angle = 0.6 * (u[:, 1] - 0.5)
        dx, dy = x - 0.5 - 0.2 * (u[:, 2] - 0.5), y - 0.5 - 0.2 * (u[:, 3] - 0.5)
        px = (dx * angle.cos() + dy * angle.sin()) / radius                                  # shape's own frame, +-1
        py = (dy * angle.cos() - dx * angle.sin()) / radius
        distance = self.distances(px, py).gather(1, (indices % 10)[:, None, None, None].expand(-1, 1, self.size, self.size))
        inside = (0.5 - distance[:, 0] * radius * self.size).clamp(0, 1)                     # smooth over one pixel
        period = 4 / self.size
        stripes = torch.where(u[:, 4] < 0.5, x, y) / period + u[:, 5]
        dots = ((x / period % 1 - 0.5).square() + (y / period % 1 - 0.5).square()) * 8 - 0.5
        texture = torch.where(u[:, 6] < 0.4, (2 * math.pi * stripes).sin(), torch.where(u[:, 6] < 0.7, dots, 0 * x))
        ramp = (x - 0.5) * (u[:, 7] - 0.5) + (y - 0.5) * (u[:, 8] - 0.5)
        light, dark = 0.7 + 0.3 * u[:, 9], 0.1 + 0.25 * u[:, 10]
        bright_shape = u[:, 11] < 0.5
        front = torch.where(bright_shape, light, dark) + 0.15 * texture.clamp(-1, 1)
        back = torch.where(bright_shape, dark, light) + 0.3 * ramp
        channels = []
        for shift in (0, 1, 2):                                                              # a colour wheel each
            tint = [0.7 + 0.3 * (2 * math.pi * (hue + shift / 3)).cos() for hue in (u[:, 12], u[:, 13])]
            channels.append(inside * front * tint[0] + (1 - inside) * back * tint[1])
        return (torch.stack(channels, dim=1) * 255).round().clamp(0, 255).to(torch.uint8)

    @staticmethod
    def distances(x, y):
        """Signed distance (roughly) to each class's outline, negative inside: (M, S, S) -> (M, 10, S, S)."""
        r, ax, ay = (x.square() + y.square()).sqrt(), x.abs(), y.abs()
        box, petals = torch.maximum(ax, ay), torch.cos(5 * torch.atan2(x, -y))
        return torch.stack([
            r - 0.85,
            (r - 0.72).abs() - 0.2,
            box - 0.78,
            (box - 0.7).abs() - 0.18,
            torch.maximum(y - 0.7, 0.87 * ax - 0.5 * y - 0.5),
            torch.minimum(torch.maximum(ax - 0.28, ay - 1), torch.maximum(ax - 1, ay - 0.28)),
            r - 0.65 - 0.35 * petals,
            torch.maximum(ax - 1.1, ay - 0.32),
            torch.maximum(r - 0.95, 0.75 - ((x - 0.45).square() + y.square()).sqrt()),
            torch.minimum(((x + 0.5).square() + (y + 0.5).square()).sqrt(), ((x - 0.5).square() + (y - 0.5).square()).sqrt()) - 0.45,
        ], dim=1)


def shrink(image, side):
    """PIL image with its shorter side brought to `side`: box-halved while twice too large, then bicubic (ADM's way)."""
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = side / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)


def centre_crop(image, side):
    """ADM's centre crop of a PIL image, side x side."""
    image = shrink(image, side)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def random_crop(image, side, share, u):
    """The paper's training crop from four numbers u in [0, 1): shorter side scaled to side .. side / share, cut, flipped."""
    image = shrink(image, side + int(u[0] * (math.ceil(side / share) - side + 1)))
    left, top = int(u[1] * (image.width - side + 1)), int(u[2] * (image.height - side + 1))
    image = image.crop((left, top, left + side, top + side))
    return image.transpose(Image.FLIP_LEFT_RIGHT) if u[3] < 0.5 else image


def read_rgb(path):
    """Any image file as RGB; 16-bit grey is scaled, not cut off."""
    with Image.open(path) as image:
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image, dtype=np.float64) / 257).clip(0, 255).astype(np.uint8))
        return image.convert("RGB")


class Folder(torch.utils.data.Dataset):
    """Images in class folders, as uint8 (3, side, side): item (i, key) is a random crop, item i a centre crop.

    With train/ and val/ (or test/) in it these are the splits; without, every 20th image is kept for validation.
    """

    def __init__(self, root, split, side, crop=1.0, classes=None):
        root, self.side, self.crop = Path(root), side, crop
        if not root.is_dir():
            raise Refused(f"no such folder: {root} (--data wants shapes, cifar10 or a folder of images in class folders)")
        parts = {"train": ["train"], "val": ["val", "test"]}
        here = next((root / name for name in parts[split] if (root / name).is_dir()), None)
        try:
            found = torchvision.datasets.ImageFolder(here or root, allow_empty=True)
        except (FileNotFoundError, OSError) as error:
            raise Refused(f"{here or root} has no class folders: wanted {root}/CLASS/IMAGE or {root}/train/CLASS/IMAGE") from error
        self.samples, self.classes = found.samples, found.classes
        if here is None and len(self.samples) >= 20:
            self.samples = [s for i, s in enumerate(self.samples) if (i % 20 == 19) == (split == "val")]
        if not self.samples:
            raise Refused(f"no images under {here or root}: wanted files {' '.join(torchvision.datasets.folder.IMG_EXTENSIONS)}")
        if classes is not None and self.classes != classes:
            if unknown := sorted(set(self.classes) - set(classes)):
                raise Refused(f"{here or root} has class folders that the training data lack: {', '.join(unknown[:5])}")
            self.samples = [(path, classes.index(self.classes[label])) for path, label in self.samples]
            self.classes = classes

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, item):
        index, key = item if isinstance(item, tuple) else (item, None)
        path = self.samples[index][0]
        try:
            image = read_rgb(path)
        except Exception as error:
            raise Refused(f"broken image {path}: {error}. Mend or remove it") from None
        if key is None:
            image = centre_crop(image, self.side)
        else:
            image = random_crop(image, self.side, self.crop, uniform(torch.tensor([key]), 4)[0].tolist())
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@dataclass
class Images:
    """A data set: labels (M,), class names, and pixels (M, 3, side, side) uint8 on the device or files to stream."""
    labels: torch.Tensor
    classes: list
    pixels: torch.Tensor = None
    files: Folder = None
    workers: int = 0

    def __len__(self):
        return len(self.labels)

    def loader(self, batches):
        """uint8 (B, 3, side, side) for each list of indices, or of (index, key), by worker processes."""
        return torch.utils.data.DataLoader(self.files, batch_sampler=batches, num_workers=self.workers,
                                           pin_memory=torch.cuda.is_available())

    def in_order(self, rows, batch):
        """Batches of (rows, uint8 images), centre crops, for the given row numbers (a range)."""
        chunks = [rows[i:i + batch] for i in range(0, len(rows), batch)]
        images = self.loader(chunks) if self.pixels is None else (self.pixels[chunk[0]:chunk[-1] + 1:chunk.step] for chunk in chunks)
        return zip(chunks, images)


def open_data(config, machine, split, side=None, classes=None):
    """The `train` or `val` images at side x side pixels (default: image_size) -> Images. Raises Refused."""
    side = side or config.image_size
    if config.data == "shapes":
        drawn = Shapes(split, side)
        pixels = torch.cat([drawn.draw(rows) for rows in torch.arange(len(drawn)).split(500)])
        return Images(torch.arange(len(drawn)) % 10, list(drawn.classes), pixels.to(machine.device))
    if config.data == "cifar10":
        if side != 32:
            raise Refused(f"cifar10 has images of 32 pixels: image_size must be 32, got {side}")
        try:
            with machine.first():
                cifar = torchvision.datasets.CIFAR10(CACHE, train=split == "train", download=True)
        except (OSError, RuntimeError) as error:
            raise Refused(f"CIFAR-10 can't be downloaded ({error}): put cifar-10-batches-py of "
                          f"{torchvision.datasets.CIFAR10.url} into {CACHE}, or give --data FOLDER") from error
        pixels = torch.from_numpy(cifar.data).permute(0, 3, 1, 2).contiguous()
        return Images(torch.tensor(cifar.targets), cifar.classes, pixels.to(machine.device))
    files = Folder(config.data, split, side, classes=classes)
    images = Images(torch.tensor([label for _, label in files.samples]), files.classes, files=files, workers=config.workers)
    if len(files) * 3 * side**2 <= RESIDENT_BYTES:
        bar = tqdm(images.in_order(range(len(files)), 256), f"reading {split}", math.ceil(len(files) / 256), disable=None, leave=False)
        images.pixels = torch.cat([batch for _, batch in bar]).to(machine.device)
    return images


def open_training_data(config, machine):
    """Training images to crop at random: resident ones with a margin around the crop, streamed ones from their files."""
    if config.data in ("shapes", "cifar10"):
        return open_data(config, machine, "train")
    images = open_data(config, machine, "train", side=math.ceil(config.image_size / config.crop))
    images.files.side, images.files.crop = config.image_size, config.crop
    return images


def augment(images, size, keys):
    """Random flip, and where images are larger than `size` a random-scale crop: float (B, 3, M, M) -> (B, 3, size, size)."""
    u = uniform(keys, 4)
    margin = images.shape[-1] - size
    flip = u[:, 3] < 0.5
    if margin == 0:
        return torch.where(flip[:, None, None, None], images.flip(3), images)
    scale = size / (size + u[:, 0] * margin)                                                 # share of the side shown
    move = (2 * u[:, 1:3] - 1) * (1 - scale[:, None])
    zero = torch.zeros_like(scale)
    theta = torch.stack([torch.where(flip, -scale, scale), zero, move[:, 0], zero, scale, move[:, 1]], dim=1)
    grid = F.affine_grid(theta.view(-1, 2, 3), [len(images), 3, size, size], align_corners=False)
    return F.grid_sample(images, grid, mode="bicubic", padding_mode="reflection", align_corners=False).clamp(-1, 1)


@functools.lru_cache(maxsize=2)
def epoch_order(seed, stage, epoch, count):
    """The order of the images in an epoch: (count,)."""
    generator = torch.Generator().manual_seed(int(fold(root_key(seed, stage), epoch)) & (2**63 - 1))
    return torch.randperm(count, generator=generator)


def batch_rows(config, machine, stage, step, batch, count):
    """This process's share of a step: which rows of the data set, and a key for each. Both (batch / world,) int64."""
    share = batch // machine.world
    place = step * batch + machine.rank * share + torch.arange(share)                        # in the endless sequence
    rows = torch.cat([epoch_order(config.seed, stage, int(e), count)[place[place // count == e] % count]
                      for e in (place // count).unique()])
    return rows, fold(root_key(config.seed, stage), place)


def training_batches(config, machine, data, start, stop):
    """Steps start .. stop-1 of tokenizer training: (step, images (b, 3, R, R) in [-1, 1], keys (b,)) on the device."""
    def plan(step):
        return batch_rows(config, machine, "tokenizer", step, config.tok_batch, len(data))

    if data.pixels is None:
        streamed = iter(data.loader(list(zip(*(t.tolist() for t in plan(step)))) for step in range(start, stop)))
    for step in range(start, stop):
        rows, keys = (t.to(machine.device, non_blocking=True) for t in plan(step))
        if data.pixels is None:
            yield step, to_float(next(streamed).to(machine.device, non_blocking=True)), keys
        else:
            yield step, augment(to_float(data.pixels[rows]), config.image_size, keys), keys


# ======================================================================================================
# 12. Training: what both stages share
# ======================================================================================================

class Machine(NamedTuple):
    """Where this process runs: one of `world` processes under torchrun, or the only one."""
    device: torch.device
    dtype: torch.dtype = torch.float32
    rank: int = 0
    world: int = 1

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    @contextlib.contextmanager
    def first(self):
        """Rank 0 goes through the block before the others do."""
        if self.rank:
            dist.barrier()
        yield
        if self.world > 1 and not self.rank:
            dist.barrier()

    def total(self, tensor):
        """Sum over all processes."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor


def start_machine(config):
    """Pick device and precision; under torchrun join the other processes. Raises Refused."""
    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        device = torch.device(device)
        if device.type == "cuda" and world > 1:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise Refused(f"device {config.device} can't be used: {str(error).splitlines()[0]}") from error
    for stage in ("tok", "ar"):
        batch, parts = getattr(config, f"{stage}_batch"), world * getattr(config, f"{stage}_accum")
        if batch % parts:
            raise Refused(f"{stage}_batch {batch} can't be split into {world} processes x {stage}_accum = {parts} equal parts")
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", device_id=device if device.type == "cuda" else None)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    auto = torch.bfloat16 if device.type == "cuda" else torch.float32
    return Machine(device, auto if config.dtype == "auto" else getattr(torch, config.dtype), rank, world)


def learning_rate(step, steps, warmup, peak, first, last):
    """Linear from `first` to `peak` in `warmup` steps; cosine to `last`, counted from step 0 as the authors do."""
    if step < warmup:
        return first + (peak - first) * step / warmup
    return last + (peak - last) * (1 + math.cos(math.pi * step / steps)) / 2


def update_ema(ema, model, decay, step):
    """ema <- d * ema + (1 - d) * model, d = min(decay, (1 + step) / (10 + step)): early weights are soon forgotten."""
    if ema is not None:
        decay = min(decay, (1 + step) / (10 + step))
        get_ema_multi_avg_fn(decay)(list(ema.parameters()), list(model.parameters()), None)
        for kept, new in zip(ema.buffers(), model.buffers()):
            kept.copy_(new)


def adamw(modules, lr, weight_decay=0.0):
    """AdamW with the authors' betas; matrices and embeddings decay, vectors don't."""
    parameters = [p for module in modules for p in module.parameters()]
    groups = [dict(params=[p for p in parameters if p.ndim >= 2], weight_decay=weight_decay),
              dict(params=[p for p in parameters if p.ndim < 2], weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def wrap(module, config, machine):
    """Compile the transformer blocks and distribute, as the settings ask."""
    if config.compile:
        for block in module.modules():
            if isinstance(block, (Block, ARBlock)):
                block.compile()
    return module if machine.world == 1 else DistributedDataParallel(module, find_unused_parameters=True)


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


def say(machine, text):
    if machine.rank == 0:
        print(text, flush=True)


def count_parameters(module):
    return f"{sum(p.numel() for p in module.parameters()):,}"


def fingerprint(module):
    """Short hash of a module's weights."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def save_checkpoint(path, config, stage, step, about, parts):
    """Write beside the old file, then rename: there is a whole checkpoint at `path` at any moment. Raises Refused."""
    state = {"format": 1, "stage": stage, "step": step, "config": asdict(config), "about": about}
    aside = path.with_suffix(".tmp")
    try:
        with open(aside, "wb") as file:
            torch.save(state | {name: part.state_dict() for name, part in parts.items() if part is not None}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise Refused(f"{path} could not be written ({error}); the previous checkpoint, if any, is intact") from error


def load_checkpoint(path, stage):
    """The dict that save_checkpoint wrote, on the CPU, its settings as Config. Raises Refused."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise Refused(f"no checkpoint {path}: python detailflow.py --stage {stage} makes one") from None
    except Exception as error:
        raise Refused(f"{path} is not a whole checkpoint ({type(error).__name__}): delete it and train again") from error
    if not isinstance(state, dict) or state.get("format") != 1 or state.get("stage") != stage:
        raise Refused(f"{path} is not a {stage} checkpoint of this version of detailflow.py")
    if unknown := set(state["config"]) - {f.name for f in fields(Config)}:
        raise Refused(f"{path} has settings that this version of detailflow.py lacks: {', '.join(sorted(unknown))}")
    return state | {"config": Config(**state["config"])}


def resume(path, config, stage, groups, about, parts):
    """Restore `parts` from the checkpoint at `path`, if there is one -> steps already done. Raises Refused.

    All randomness being a function of seed and step (section 1), weights, optimiser and step are the whole state.
    """
    if not path.exists():
        return 0
    state = load_checkpoint(path, stage)
    free = {"tok_steps", "ar_steps", "data"}         # more steps may be asked for; the data are compared in `about`
    changed = [f"{f.name} {getattr(state['config'], f.name)} -> {getattr(config, f.name)}" for f in fields(Config)
               if f.metadata["group"] in groups and f.name not in free and getattr(state["config"], f.name) != getattr(config, f.name)]
    changed += [f"{name} {state['about'].get(name)} -> {value}" for name, value in about.items() if state["about"].get(name) != value]
    if changed:
        raise Refused(f"{path} was trained with other settings ({'; '.join(changed)}): choose another --out or delete the file")
    for name, part in parts.items():
        if part is not None:
            part.load_state_dict(state[name])
    return state["step"]


def load_model(path, stage, device="cpu", ema=True):
    """Tokenizer or ARTransformer from a checkpoint, averaged weights if it has them, ready for use -> model, about."""
    state = load_checkpoint(Path(path), stage)
    model = (Tokenizer if stage == "tokenizer" else ARTransformer)(state["config"])
    model.load_state_dict(state["ema" if ema and "ema" in state else "model"])
    return model.to(device).eval().requires_grad_(False), state["about"]


class Progress:
    """Progress bar and log.jsonl. Sums stay on the device until a line is due, so that no step waits for one."""

    def __init__(self, config, machine, stage, start, steps, batch):
        self.every, self.machine, self.stage, self.batch, self.steps = config.log_every, machine, stage, batch, steps
        self.sums, self.count, self.since = {}, 0, time.time()
        self.bar = tqdm(total=steps, initial=start, desc=stage, disable=None if machine.rank == 0 else True)
        self.path = Path(config.out) / "log.jsonl"
        if machine.rank == 0:                        # forget what a killed run logged after its last checkpoint
            lines = self.path.read_text().splitlines() if self.path.exists() else []
            kept = [line for line in lines if not (stage, start) < ((r := json.loads(line))["stage"], r.get("step", 0)) <= (stage, math.inf)]
            self.path.write_text("".join(line + "\n" for line in kept))
            self.write({"stage": stage, "step": start, "event": "start", "torch": torch.__version__, "device": str(machine.device),
                        "device_name": torch.cuda.get_device_name() if machine.device.type == "cuda" else f"{os.cpu_count()} cores",
                        "world": machine.world, "config": asdict(config)})

    def write(self, record):
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")

    def step(self, done, lr, **values):
        """Count one step; every log_every steps write the means since the last line."""
        self.bar.update()
        self.count += 1
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
        if done % self.every and done != self.steps:
            return
        names, means = list(self.sums), torch.stack(list(self.sums.values())) / self.count
        means = (self.machine.total(means) / self.machine.world).tolist()
        record = {"stage": self.stage, "step": done} | {k: round(v, 5) for k, v in zip(names, means)}
        record |= {"lr": lr, "images_per_s": round(self.count * self.batch / (time.time() - self.since), 1)}
        self.sums, self.count, self.since = {}, 0, time.time()
        if self.machine.rank == 0:
            self.write(record)
            text = "  ".join(f"{k} {v:.4g}" for k, v in record.items() if k not in ("stage", "step"))
            self.bar.write(f"{self.stage} {done:6d}/{self.steps}  {text}")

    def pause(self):
        """Leave out of images/s what has been done since the last step (pictures, checkpoints)."""
        self.paused = time.time()

    def go_on(self):
        self.since += time.time() - self.paused


# ======================================================================================================
# 13. Stage one: the tokenizer
# ======================================================================================================

def train_tokenizer(config, machine):
    """Train the tokenizer, or go on with it, until config.tok_steps: leaves OUT/tokenizer.pt."""
    path, device = Path(config.out) / "tokenizer.pt", machine.device
    train = open_training_data(config, machine)
    val = open_data(config, machine, "val", classes=train.classes)
    about = {"classes": list(train.classes), "images": len(train)}
    torch.manual_seed(config.seed)
    model = Tokenizer(config).to(device)
    judge = PatchDiscriminator(config.image_size).to(device) if config.disc_weight else None
    ema = copy.deepcopy(model).requires_grad_(False) if config.tok_ema else None
    optimizer = adamw([model], config.tok_lr)
    judge_optimizer = adamw([judge], config.tok_lr) if judge else None
    parts = dict(model=model, ema=ema, optimizer=optimizer, judge=judge, judge_optimizer=judge_optimizer)
    start = resume(path, config, "tokenizer", ("data", "tokenizer", "tokenizer training"), about, parts)
    if start >= config.tok_steps:
        say(machine, f"tokenizer: {start} steps done, in {path}")
        return
    say(machine, f"tokenizer: {count_parameters(model)} parameters, {len(train)} images, steps {start}..{config.tok_steps}")
    distributed, distributed_judge = wrap(model, config, machine), judge and wrap(judge, config, machine)
    progress = Progress(config, machine, "tokenizer", start, config.tok_steps, config.tok_batch)

    for step, images, keys in training_batches(config, machine, train, start, config.tok_steps):
        lr = learning_rate(step, config.tok_steps, config.tok_warmup, config.tok_lr, 0.1 * config.tok_lr, 0.1 * config.tok_lr)
        adversarial = judge is not None and step >= config.disc_start
        prefix = draw_prefix(config, fold(root_key(config.seed, "prefix"), step))            # the same for all processes
        log = {}

        # -- the tokenizer's step --
        for part, part_keys in zip(images.chunk(config.tok_accum), keys.chunk(config.tok_accum)):
            start_noise, ranks = draw_noise(config, part_keys, prefix)
            target = degrade(part, config, prefix)                                           # (b, 3, S, S)
            with machine.autocast():
                out = distributed(part, prefix, start_noise, ranks)
                target = target.repeat(len(out.pixels) // len(target), 1, 1, 1)              # clean half, corrected half
                pixel_loss = F.mse_loss(out.pixels, target)
                loss = pixel_loss + out.code_loss
                if adversarial:
                    fool_loss = -judge(out.pixels).mean()
                    loss = loss + config.disc_weight * fool_loss
            (loss / config.tok_accum).backward()
            model.quantizer.track(out.codes)
        log |= dict(loss=loss, pixel_loss=pixel_loss, code_loss=out.code_loss)
        log["grad_norm"] = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        set_lr(optimizer, lr)
        optimizer.step()
        optimizer.zero_grad()
        update_ema(ema, model, config.tok_ema, step)

        # -- the discriminator's step, on the last part of the batch --
        if adversarial:
            judge_optimizer.zero_grad()                   # the tokenizer's backward has left gradients here
            with machine.autocast():
                real, fake = distributed_judge(torch.cat([target, out.pixels.detach()])).float().chunk(2)
                judge_loss = config.disc_weight * judge.loss(real, fake)
            judge_loss.backward()
            torch.nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
            set_lr(judge_optimizer, lr)
            judge_optimizer.step()
            log |= dict(fool_loss=fool_loss, judge_loss=judge_loss)

        log["usage"], log["perplexity"] = model.quantizer.usage()
        done, last = step + 1, step + 1 == config.tok_steps
        progress.step(done, lr, **log)
        progress.pause()
        if machine.rank == 0 and (done % config.picture_every == 0 or last):
            picture = draw_reconstructions(ema or model, next(iter(val.in_order(range(8), 8)))[1].to(device))
            save_picture(picture, Path(config.out) / f"tokenizer_{done:07d}.png")
        if machine.rank == 0 and (done % config.save_every == 0 or last):
            save_checkpoint(path, config, "tokenizer", done, about, parts)
        progress.go_on()
    if machine.world > 1:
        dist.barrier()


# ======================================================================================================
# 14. Stage two: the AR transformer, on codes extracted once
# ======================================================================================================

def extract_codes(config, machine, tokenizer, tokenizer_hash):
    """Encode the training set with its augmentations into one memory-mapped file, or find it there -> memmap, classes.

    One record an image: label, and (views, 3, N) codes: clean, perturbed, label. Views: ten crops of a 1.1 times
    larger image for folders, as the paper; the image and its mirror image for the small built-in sets.
    """
    folder = config.data not in ("shapes", "cifar10")
    side, views = (int(1.1 * config.image_size), 10) if folder else (config.image_size, 2)
    images = open_data(config, machine, "train", side=side)
    what = f"{tokenizer_hash} {config.data} {len(images)} {side} {config.seed} {config.noise_topk} {config.correction}"
    path = Path(config.out) / f"codes-{hashlib.sha256(what.encode()).hexdigest()[:12]}.npy"
    record = np.dtype([("label", np.int32), ("codes", np.uint16, (views, 3, config.num_tokens))])
    if not path.exists():
        aside = path.with_suffix(".tmp")
        with machine.first():
            if machine.rank == 0:
                np.lib.format.open_memmap(aside, "w+", record, (len(images),)).flush()
        cache = np.lib.format.open_memmap(aside, "r+")
        rows = range(machine.rank, len(images), machine.world)
        bar = tqdm(images.in_order(rows, max(1, config.eval_batch // views * 2)), "extracting codes", disable=None if machine.rank == 0 else True,
                   total=math.ceil(len(rows) / max(1, config.eval_batch // views * 2)))
        for chunk, pixels in bar:
            x = to_float(pixels.to(machine.device))
            x = torch.stack(TF.ten_crop(x, config.image_size) if folder else (x, x.flip(3)), dim=1)      # (b, views, 3, R, R)
            place = torch.tensor(chunk)[:, None] * views + torch.arange(views)
            keys = fold(root_key(config.seed, "codes"), place.flatten()).to(machine.device)
            with machine.autocast():
                codes = tokenizer.triples(x.flatten(0, 1), keys)                             # (b * views, 3, N)
            cache["codes"][np.array(chunk)] = codes.unflatten(0, (-1, views)).cpu().numpy()
            cache["label"][np.array(chunk)] = images.labels[torch.tensor(chunk)].numpy()
        cache.flush()
        if machine.world > 1:
            dist.barrier()
        if machine.rank == 0:
            os.replace(aside, path)
            for old in path.parent.glob("codes-*.npy"):
                if old != path:
                    old.unlink()                         # of another tokenizer
        if machine.world > 1:
            dist.barrier()
    say(machine, f"codes of {len(images)} images x {views} views in {path}")
    return np.load(path, mmap_mode="r"), images.classes


def ar_batch(config, machine, cache, step):
    """This process's share of a step -> labels (b,), input codes (b, N), target codes (b, N), keys (b,).

    A random view of each image; with probability correction_share the sequence is (perturbed -> repaired) instead of
    (clean -> clean): the transformer sees an error of the kind that it will make itself, and what to do about it.
    """
    rows, keys = batch_rows(config, machine, "ar", step, config.ar_batch, len(cache))
    records = cache[rows.numpy()]
    u = uniform(fold(keys, 10**6), 2)
    view = (u[:, 0] * records["codes"].shape[1]).long().numpy()
    codes = torch.from_numpy(records["codes"][np.arange(len(rows)), view].astype(np.int64))      # (b, 3, N)
    clean, perturbed, label = codes.unbind(1)
    corrected = u[:, 1:] < config.correction_share                                           # (b, 1)
    batch = (torch.from_numpy(records["label"].astype(np.int64)), torch.where(corrected, perturbed, clean),
             torch.where(corrected, label, clean), keys)
    return [t.to(machine.device, non_blocking=True) for t in batch]


def train_ar(config, machine):
    """Train the AR transformer on the codes of OUT/tokenizer.pt, or go on with it: leaves OUT/ar.pt."""
    path, device = Path(config.out) / "ar.pt", machine.device
    tokenizer, about = load_model(Path(config.out) / "tokenizer.pt", "tokenizer", device)
    check_tokenizer(config, tokenizer.config)
    about |= {"tokenizer": fingerprint(tokenizer)}
    torch.manual_seed(config.seed)
    model = ARTransformer(config).to(device)
    ema = copy.deepcopy(model).requires_grad_(False) if config.ar_ema else None
    optimizer = adamw([model], config.ar_lr, config.ar_weight_decay)
    parts = dict(model=model, ema=ema, optimizer=optimizer)
    start = resume(path, config, "ar", ("data", "tokenizer", "AR transformer", "AR training"), about, parts)
    if start >= config.ar_steps:
        say(machine, f"ar: {start} steps done, in {path}")
        return
    cache, _ = extract_codes(config, machine, tokenizer, about["tokenizer"])
    val = open_data(config, machine, "val", classes=about["classes"])
    val_labels, val_codes = encode_images(config, machine, tokenizer, val, 512)
    say(machine, f"ar: {count_parameters(model)} parameters, steps {start}..{config.ar_steps}; "
                 f"loss of a guess: ln V = {math.log(config.codebook_size):.3f}")
    distributed = wrap(model, config, machine)
    progress = Progress(config, machine, "ar", start, config.ar_steps, config.ar_batch)

    for step in range(start, config.ar_steps):
        lr = learning_rate(step, config.ar_steps, config.ar_warmup, config.ar_lr, 0.005 * config.ar_lr, 0.01 * config.ar_lr)
        batch = ar_batch(config, machine, cache, step)
        for labels, given, target, keys in zip(*(t.chunk(config.ar_accum) for t in batch)):
            with machine.autocast():
                logits = distributed(labels, given, keys)                                    # (b, N, V)
            loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
            (loss / config.ar_accum).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        set_lr(optimizer, lr)
        optimizer.step()
        optimizer.zero_grad()
        update_ema(ema, model, config.ar_ema, step)

        done, last = step + 1, step + 1 == config.ar_steps
        progress.step(done, lr, loss=loss, grad_norm=norm)
        progress.pause()
        if machine.rank == 0 and (done % config.picture_every == 0 or last):
            held_out = ar_loss(ema or model, machine, val_labels, val_codes, config.eval_batch).mean().item()
            progress.write({"stage": "ar", "step": done, "val_loss": round(held_out, 5)})
            progress.bar.write(f"ar {done:6d}  held-out loss {held_out:.4f}")
            picture = draw_samples(tokenizer, ema or model, config, config.seed)
            save_picture(picture, Path(config.out) / f"ar_{done:07d}.png")
        if machine.rank == 0 and (done % config.save_every == 0 or last):
            save_checkpoint(path, config, "ar", done, about, parts)
        progress.go_on()
    if machine.world > 1:
        dist.barrier()


# ======================================================================================================
# 15. Pictures
# ======================================================================================================

def save_picture(images, path, columns=8):
    """Write (M, 3, S, S) in [-1, 1] as a grid, small images enlarged so that one can see them."""
    zoom = max(1, 64 // images.shape[-1])
    images = to_uint8(images).repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    grid = torchvision.utils.make_grid(images.cpu(), nrow=columns, padding=2, pad_value=255)
    aside = path.with_name(path.name + ".tmp")
    Image.fromarray(grid.permute(1, 2, 0).numpy()).save(aside, format="png")
    os.replace(aside, path)


def strip_lengths(config, most=8):
    """About `most` prefix lengths from 1 to N, each about twice the one before."""
    N, allowed = config.num_tokens, prefix_lengths(config)
    wanted = [N ** (i / (most - 1)) for i in range(most)]
    return sorted({min(allowed, key=lambda n: abs(n - w)) for w in wanted} | {allowed[0], N})


def coarse_to_fine(tokenizer, codes):
    """Each sequence decoded from ever more of its tokens, enlarged to full size: codes (B, N) -> (B, lengths, 3, R, R)."""
    R = tokenizer.config.image_size
    steps = [tokenizer.decode(codes[:, :n]) for n in strip_lengths(tokenizer.config)]
    return torch.stack([F.interpolate(x, size=(R, R), mode="nearest") for x in steps], dim=1)


def draw_reconstructions(tokenizer, pixels):
    """A row for each image (B, 3, R, R) uint8: from 1 ... N tokens, then the original. -> (B * columns, 3, R, R)."""
    images = to_float(pixels)
    strips = coarse_to_fine(tokenizer, tokenizer.encode(images))
    return torch.cat([strips, images[:, None]], dim=1).flatten(0, 1)


def draw_samples(tokenizer, model, config, seed, columns=8):
    """A row for each of the first ten classes. -> (classes * columns, 3, R, R)."""
    labels = torch.arange(min(config.num_classes, 10)).repeat_interleave(columns)
    seeds = seed + torch.arange(len(labels))
    return tokenizer.decode(generate(model, labels, **sampling_settings(config), seeds=seeds))


def sampling_settings(config):
    return {name: getattr(config, name) for name in ("guidance", "schedule", "temperature", "top_k", "top_p")}


# ======================================================================================================
# 16. Inception and the Frechet distance
# ======================================================================================================

INCEPTION_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


def download(url, sha256, flag):
    """Path of a file kept in CACHE, downloaded on first use, its hash checked before it gets its name. Raises Refused."""
    path = CACHE / url.split("/")[-1]
    if not path.exists():
        try:
            CACHE.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, path, hash_prefix=sha256)
        except Exception as error:
            raise Refused(f"{url} can't be downloaded ({error}): put the file at {path} or give {flag} PATH") from error
    return path


def tf_resize(images, size=299):
    """TensorFlow 1's bilinear resize: source position i * in / out, no half-pixel shift, clamped at the edge.

    FID's published numbers are made with it. (B, 3, H, W) float -> (B, 3, size, size).
    """
    def weights(length):
        position = torch.arange(size, device=images.device) * (length / size)
        low = position.long()
        high, share = (low + 1).clamp(max=length - 1), (position - low).to(images.dtype)
        matrix = images.new_zeros(size, length)
        matrix.scatter_add_(1, low[:, None], 1 - share[:, None])
        return matrix.scatter_add_(1, high[:, None], share[:, None])                         # (size, length)
    return weights(images.shape[2]) @ images @ weights(images.shape[3]).T


class InceptionV3(nn.Module):
    """The network behind FID: torchvision's Inception v3 with the 2015 TensorFlow weights and their kind of pooling."""

    def __init__(self, weights):
        """weights: path of the published file (its state dict). Raises Refused when it is another file."""
        super().__init__()
        net = torchvision.models.inception.Inception3(num_classes=1008, aux_logits=False, transform_input=False, init_weights=False)
        try:
            net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        except Exception as error:
            raise Refused(f"{weights} does not hold FID's Inception weights ({str(error).splitlines()[0]}): get {INCEPTION_URL}") from error
        for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"):    # average pooling that leaves padding out
            self.pool_before(getattr(net, f"Mixed_{name}"), lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))
        self.pool_before(net.Mixed_7c, lambda x: F.max_pool2d(x, 3, 1, 1))
        self.fc, net.fc = net.fc, nn.Identity()
        self.net = net
        self.eval().requires_grad_(False)

    @staticmethod
    def pool_before(block, pool):
        """Give a block's pooling branch pool(the block's input) instead of what torchvision pools there."""
        block.register_forward_pre_hook(lambda module, inputs: setattr(module, "pooled", pool(inputs[0])))
        block.branch_pool.register_forward_pre_hook(lambda module, inputs: block.pooled)

    def forward(self, images):
        """uint8 (B, 3, H, W) -> pool features (B, 2048), logits (B, 1008), float32."""
        if images.dtype != torch.uint8:
            raise Refused(f"Inception wants uint8 images, got {images.dtype}: FID is defined on 8-bit pictures")
        with torch.autocast(images.device.type, enabled=False), torch.backends.cudnn.flags(allow_tf32=False):
            features = self.net((tf_resize(images.float()) - 128) / 128)
            return features, self.fc(features)


class Moments:
    """Running mean and covariance of features, and Inception Score, in float64 and over all processes."""

    SPLIT = 5000                                     # images to one Inception Score, as ADM's evaluator

    def __init__(self, machine, samples):
        def zeros(*shape):
            return torch.zeros(*shape, dtype=torch.float64, device=machine.device)
        self.count, self.sum, self.outer = zeros(1), zeros(2048), zeros(2048, 2048)
        splits = math.ceil(samples / self.SPLIT)
        self.split_count, self.split_p, self.split_entropy = zeros(splits), zeros(splits, 1008), zeros(splits)

    def add(self, inception, rows, pixels):
        """Count images with row numbers `rows`: uint8 (B, 3, H, W)."""
        features, logits = inception(pixels)
        f = features.double()
        self.count += len(f)
        self.sum += f.sum(0)
        self.outer += f.T @ f
        p = (logits - inception.fc.bias).double().softmax(-1)      # the score is defined without the bias
        split = torch.tensor(rows, device=p.device) // self.SPLIT
        self.split_count.index_add_(0, split, torch.ones_like(p[:, 0]))
        self.split_p.index_add_(0, split, p)
        self.split_entropy.index_add_(0, split, torch.special.entr(p).sum(-1))

    def finish(self, machine):
        """-> mean (2048,), covariance (2048, 2048) with divisor n - 1, Inception Score, count."""
        for tensor in (self.count, self.sum, self.outer, self.split_count, self.split_p, self.split_entropy):
            machine.total(tensor)
        n = self.count
        mean = self.sum / n
        covariance = (self.outer - n * torch.outer(mean, mean)) / (n - 1)
        p = self.split_p / self.split_count[:, None]
        score = (torch.special.entr(p).sum(-1) - self.split_entropy / self.split_count).exp().mean()     # exp(E KL(p || mean p))
        return mean.cpu().numpy(), covariance.cpu().numpy(), score.item(), int(n)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of two Gaussians, in float64.

    tr (S1 S2)^(1/2) is the sum of the roots of the eigenvalues of S1 S2, which are those of the symmetric
    S1^(1/2) S2 S1^(1/2): real and not negative, also where sqrtm returns complex or broken results.
    """
    mu1, sigma1, mu2, sigma2 = (np.atleast_1d(np.asarray(x, np.float64)) for x in (mu1, sigma1, mu2, sigma2))
    sigma1, sigma2 = np.atleast_2d(sigma1), np.atleast_2d(sigma2)
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape or sigma1.shape != mu1.shape * 2:
        raise Refused(f"means and covariances do not fit: {mu1.shape}, {sigma1.shape}, {mu2.shape}, {sigma2.shape}")
    values, vectors = np.linalg.eigh(sigma1)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ sigma2 @ root).clip(0)).sum()
    return float(np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * cross)


# ======================================================================================================
# 17. Evaluation
# ======================================================================================================

def psnr(a, b):
    """Peak signal-to-noise ratio in dB of two batches in [-1, 1], after rounding to 8 bits, image by image: (B,)."""
    error = (to_uint8(a).float() - to_uint8(b).float()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(255**2 / error.clamp(min=1e-10))


@torch.no_grad()
def encode_images(config, machine, tokenizer, images, most):
    """Labels (M,) and codes (M, N) of up to `most` images, evenly spread over the set."""
    rows = range(0, len(images), max(1, len(images) // most))[:most]
    with machine.autocast():
        codes = [tokenizer.encode(to_float(x.to(machine.device))) for _, x in images.in_order(rows, config.eval_batch)]
    return images.labels[torch.tensor(rows)].to(machine.device), torch.cat(codes)


@torch.no_grad()
def ar_loss(model, machine, labels, codes, batch):
    """Mean cross-entropy of each position on given codes: (N,)."""
    total = 0
    for y, z in zip(labels.split(batch), codes.split(batch)):
        with machine.autocast():
            logits = model(y, z)
        total = total + F.cross_entropy(logits.transpose(1, 2), z, reduction="none").sum(0)
    return total / len(codes)


@torch.no_grad()
def evaluate_tokenizer(config, machine, tokenizer, images):
    """PSNR by prefix length, codebook use, and whether self-correction corrects, on up to 2,000 validation images."""
    lengths, sums, used = strip_lengths(config), {}, torch.zeros(config.codebook_size, device=machine.device)
    quarters = [n for n in (config.num_tokens // 4, config.num_tokens // 2) if n in prefix_lengths(config)]
    lengths = sorted({*lengths, *quarters})
    rows = range(0, len(images), max(1, len(images) // 2000))
    for chunk, pixels in images.in_order(rows, config.eval_batch):
        x, keys = to_float(pixels.to(machine.device)), fold(root_key(config.seed, "eval"), torch.tensor(chunk)).to(machine.device)
        past = tokenizer.encode_patches(x)
        clean = tokenizer.quantize(past)
        used.index_add_(0, clean.codes.flatten(), torch.ones_like(clean.codes.flatten(), dtype=torch.float))
        found = {}
        for n in lengths:
            y = tokenizer.decode(clean.codes[:, :n])
            small = F.interpolate(x, size=y.shape[2:], mode="area")
            large = F.interpolate(y, size=x.shape[2:], mode="bicubic", align_corners=False)
            found[f"psnr {n} tokens, own size"], found[f"psnr {n} tokens, full size"] = psnr(y, small), psnr(large, x)
        start, ranks = draw_noise(config, keys, config.num_tokens)
        if start is not None:
            fixed = tokenizer.correct(past, clean, start, ranks)
            kept = torch.where(fixed.redone, clean.codes, fixed.codes)       # perturbed, the rest as it was
            found["psnr perturbed, rest kept"] = psnr(tokenizer.decode(kept), x)
            found["psnr perturbed, rest re-encoded"] = psnr(tokenizer.decode(fixed.codes), x)
        for name, values in found.items():
            sums[name] = sums.get(name, 0) + values.double().sum()
    p = used / used.sum()
    results = {name: round(value.item() / len(rows), 3) for name, value in sums.items()}
    return results | {"images": len(rows), "codebook usage": round((used > 0).float().mean().item(), 4),
                      "codebook perplexity": round(torch.special.entr(p).sum().exp().item(), 1)}


def evaluate_ar(config, machine, model, labels, codes):
    """Held-out cross-entropy in nats, by group."""
    loss = ar_loss(model, machine, labels, codes, config.eval_batch)
    groups = {f"ar loss, codes {i}..{i + config.group_size - 1}": round(loss[i:i + config.group_size].mean().item(), 4)
              for i in range(0, config.num_tokens, config.group_size)}
    return {"ar loss": round(loss.mean().item(), 4), "ln V": round(math.log(config.codebook_size), 4), **groups}


@torch.no_grad()
def evaluate_fid(config, machine, tokenizer, model, inception, train, val):
    """Reconstruction FID (validation images against their reconstructions), generation FID and Inception Score."""
    def moments(samples, batches):
        total = Moments(machine, samples)
        for rows, pixels in tqdm(batches, leave=False, disable=None if machine.rank == 0 else True):
            total.add(inception, list(rows), pixels.to(machine.device))
        return total.finish(machine)

    def share(count):
        return range(machine.rank, count, machine.world)

    def rebuilt():
        for rows, pixels in val.in_order(share(len(val)), config.eval_batch):
            with machine.autocast():
                yield rows, to_uint8(tokenizer.decode(tokenizer.encode(to_float(pixels.to(machine.device)))))

    def generated():
        mine, n = share(config.eval_samples), config.eval_batch
        for rows in (mine[i:i + n] for i in range(0, len(mine), n)):
            index = torch.tensor(rows)                   # balanced classes; image i has seed + i
            with machine.autocast():
                codes = generate(model, index % config.num_classes, **sampling_settings(config), seeds=config.seed + index)
                yield rows, to_uint8(tokenizer.decode(codes))

    real = moments(len(val), val.in_order(share(len(val)), config.eval_batch))
    recon = moments(len(val), rebuilt())
    if config.reference:
        reference, whose = load_reference(config.reference), config.reference
    else:
        mean, covariance, _, count = moments(len(train), train.in_order(share(len(train)), config.eval_batch))
        reference, whose = (mean, covariance), f"{count} training images of {config.data}"
    mean, covariance, score, count = moments(config.eval_samples, generated())
    for what, n in (("reconstruction FID", len(val)), ("generation FID", count)):
        if n < 2048:
            say(machine, f"warning: {what} over {n} images is not comparable with anything: covariances need more than 2,048")
    return {"reconstruction FID": round(frechet_distance(*recon[:2], *real[:2]), 4),
            "generation FID": round(frechet_distance(mean, covariance, *reference), 4), "Inception Score": round(score, 3),
            "protocol": {"weights sha256": INCEPTION_SHA256[:16] if config.inception == "auto" else file_hash(config.inception),
                         "resize": "TensorFlow 1 bilinear to 299", "reconstruction reference": f"{len(val)} validation images",
                         "generation reference": whose, "samples": count, "classes": "balanced", "seeds": f"{config.seed} + i",
                         "ema": bool(config.ar_ema), "dtype": str(machine.dtype), **sampling_settings(config)}}


def file_hash(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def load_reference(path):
    """mu and sigma of an npz such as ADM's VIRTUAL_imagenet256_labeled.npz. Raises Refused."""
    try:
        with np.load(path) as stored:
            return stored["mu"], stored["sigma"]
    except Exception as error:
        raise Refused(f"--reference {path} is not an npz file with mu and sigma ({error})") from error


def evaluate(config, machine):
    """Measure OUT/tokenizer.pt and OUT/ar.pt: prints, and writes OUT/results.json and pictures."""
    out = Path(config.out)
    tokenizer, about = load_model(out / "tokenizer.pt", "tokenizer", machine.device)
    model, ar_about = load_model(out / "ar.pt", "ar", machine.device)
    check_tokenizer(config, tokenizer.config)
    if ar_about["tokenizer"] != fingerprint(tokenizer):
        raise Refused(f"{out / 'ar.pt'} was trained on the codes of another tokenizer than {out / 'tokenizer.pt'}: train it again")
    val = open_data(config, machine, "val", classes=about["classes"])
    results = {"command": " ".join(sys.argv), "config": asdict(config), "torch": torch.__version__, "device": str(machine.device)}
    results["tokenizer"] = evaluate_tokenizer(config, machine, tokenizer, val)
    results["ar"] = evaluate_ar(config, machine, model, *encode_images(config, machine, tokenizer, val, 2000))
    for part in ("tokenizer", "ar"):
        for name, value in results[part].items():
            say(machine, f"  {name:42s} {value}")
    gain = [results["tokenizer"].get(f"psnr perturbed, rest {how}", 0) for how in ("re-encoded", "kept")]
    say(machine, f"self-correction: re-encoding after a perturbed group gains {gain[0] - gain[1]:+.2f} dB over keeping the rest")
    if machine.rank == 0:
        pixels = next(iter(val.in_order(range(8), 8)))[1].to(machine.device)
        rows = len(strip_lengths(config))
        save_picture(draw_reconstructions(tokenizer, pixels), out / "reconstructions.png", rows + 1)
        save_picture(draw_samples(tokenizer, model, config, config.seed), out / "samples.png")
        codes = generate(model, torch.arange(8) % config.num_classes, **sampling_settings(config), seeds=config.seed + torch.arange(8))
        save_picture(coarse_to_fine(tokenizer, codes).flatten(0, 1), out / "coarse_to_fine.png", rows)
        say(machine, f"pictures: {out}/reconstructions.png, samples.png, coarse_to_fine.png")
    if config.inception == "none":
        say(machine, "FID: not measured, for lack of Inception's weights (--inception auto downloads them, --inception FILE has them)")
    else:
        try:
            with machine.first():
                path = download(INCEPTION_URL, INCEPTION_SHA256, "--inception") if config.inception == "auto" else config.inception
        except Refused as error:
            say(machine, f"FID: not measured: {error}")
        else:
            inception = InceptionV3(path).to(machine.device)
            train = None if config.reference else open_data(config, machine, "train")
            results["fid"] = evaluate_fid(config, machine, tokenizer, model, inception, train, val)
            say(machine, json.dumps(results["fid"], indent=1))
    if machine.rank == 0:
        (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")


# ======================================================================================================
# 18. Command line
# ======================================================================================================

def check_tokenizer(config, made_with):
    """Refuse a tokenizer of other sizes than the settings ask for."""
    for f in fields(Config):
        if f.metadata["group"] == "tokenizer" and getattr(made_with, f.name) != getattr(config, f.name):
            raise Refused(f"the tokenizer was trained with {f.name} {getattr(made_with, f.name)}, not {getattr(config, f.name)}")


def parse(argv):
    """Command line -> (Config, stage). Every field of Config is a flag; a preset sets defaults, flags win."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--preset", choices=PRESETS, default="shapes", help="named settings that the flags below override")
    first.add_argument("--stage", choices=("tokenizer", "ar", "eval", "all"), default="all", help="what to do (default: all)")
    first.add_argument("--table", action="store_true", help="print the resolution mapping R(n) and exit")
    chosen = first.parse_known_args([a for a in argv if a not in ("-h", "--help")])[0]
    preset = PRESETS[chosen.preset]
    parser = argparse.ArgumentParser(parents=[first], description=__doc__.split("\n\n")[0], allow_abbrev=False)
    groups = {}
    for f in fields(Config):
        group = groups.setdefault(f.metadata["group"], None) or parser.add_argument_group(f.metadata["group"])
        groups[f.metadata["group"]] = group
        default = preset.get(f.name, f.default)
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(type=f.type, metavar=f.type.__name__.upper())
        group.add_argument("--" + f.name.replace("_", "-"), default=default, help=f"{f.metadata['help']} [{default}]", **kind)
    values = vars(parser.parse_args(argv))
    stage, table = values.pop("stage"), values.pop("table")
    values["out"] = values["out"] or f"runs/{values.pop('preset')}"
    values.pop("preset", None)
    config = Config(**values)
    if table:
        print(resolution_table(config))
        sys.exit()
    return config, stage


def main(argv=None):
    try:
        config, stage = parse(sys.argv[1:] if argv is None else argv)
        machine = start_machine(config)
        if config.data not in ("shapes", "cifar10"):
            config.num_classes = len(Folder(config.data, "train", config.image_size).classes)
        try:
            Path(config.out).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Refused(f"--out {config.out} can't be made: {error.strerror}") from error
        if stage in ("tokenizer", "all"):
            train_tokenizer(config, machine)
        if stage in ("ar", "all"):
            train_ar(config, machine)
        if stage in ("eval", "all"):
            evaluate(config, machine)
    except Refused as refused:
        print(f"detailflow: {refused}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ndetailflow: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
