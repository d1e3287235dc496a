"""Claims about detailflow.py, each checked: python -m pytest -q

On the CPU, without a network, in under three minutes. Tests that compare with the authors' numbers need ../shared
and skip without it.
"""

import hashlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image

import detailflow as df
import sample

torch.set_num_threads(1)  # models this small gain nothing from more, and lose much when the cores are busy
HERE = Path(__file__).parent
SHARED = HERE.parent / "shared"
TINY = {
    "image_size": 16,
    "num_tokens": 12,
    "group_size": 3,
    "patch_size": 4,
    "codebook_size": 40,
    "noise_topk": 8,
    "enc_width": 24,
    "enc_depth": 2,
    "enc_heads": 2,
    "dec_width": 16,
    "dec_depth": 2,
    "dec_heads": 2,
    "ar_width": 32,
    "ar_depth": 2,
    "ar_heads": 2,
    "ar_mlp": 48,
    "tok_batch": 8,
    "ar_batch": 8,
    "tok_warmup": 2,
    "ar_warmup": 2,
    "workers": 0,
    "eval_batch": 100,
}
CPU = df.Machine(torch.device("cpu"))
needs_shared = pytest.mark.skipif(not (SHARED / "vectors/set1.pt").exists(), reason="../shared/vectors is absent")


def flags(settings, **more):
    return [word for k, v in (settings | more).items() for word in ("--" + k.replace("_", "-"), str(v))]


@pytest.fixture
def config():
    return df.Config(**TINY)


@pytest.fixture
def tokenizer(config):
    torch.manual_seed(0)
    return df.Tokenizer(config)


@pytest.fixture
def ar(config):
    torch.manual_seed(0)
    model = df.ARTransformer(config)
    torch.nn.init.normal_(model.output.weight)  # zero at first, which would hide every difference
    return model


def images(count=4, size=16):
    return df.to_float(df.Shapes("train", size).draw(torch.arange(count)))


# == 1. Randomness ==


def test_uniform_numbers_are_uniform_and_independent_of_their_neighbours():
    u = df.uniform(df.fold(df.root_key(0, "test"), torch.arange(2000)), 50)
    assert 0 <= u.min() and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.005 and abs(u.var() - 1 / 12) < 0.002
    for other in (u.roll(1, 0), u.roll(1, 1)):
        assert abs(torch.corrcoef(torch.stack([u.flatten(), other.flatten()]))[0, 1]) < 0.02


def test_random_numbers_of_a_sample_do_not_depend_on_its_batch():
    keys = df.fold(df.root_key(1, "test"), torch.arange(8))
    assert torch.equal(df.uniform(keys, 5)[3:5], df.uniform(keys[3:5], 5))
    assert not torch.equal(df.root_key(0, "a"), df.root_key(0, "b"))


# == 2. Settings ==


@pytest.mark.parametrize(
    "bad, word",
    [
        ({"num_tokens": 10, "group_size": 4}, "multiple"),
        ({"causal_num": 3}, "multiple"),
        ({"image_size": 30}, "multiple"),
        ({"num_tokens": 4, "group_size": 4}, "at least 8"),
        ({"enc_heads": 5}, "multiple"),
        ({"ar_heads": 5, "ar_width": 30}, "4"),
        ({"guidance": float("nan")}, "guidance"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"coarse_prob": 1.5}, "0..1"),
        ({"noise_topk": 600}, "512"),
        ({"schedule": "cosine"}, "constant, linear"),
        ({"tok_steps": 0}, "tok_steps"),
        ({"codebook_size": 70000}, "65536"),
        ({"num_tokens": "32"}, "int"),
        ({"dtype": "half"}, "bfloat16"),
    ],
)
def test_impossible_settings_are_refused_with_the_reason(bad, word):
    with pytest.raises(df.Refused, match=word):
        df.Config(**bad)


def test_every_setting_is_a_flag_and_presets_are_valid():
    for name in df.PRESETS:
        config, stage, _ = df.parse(["--preset", name, "--seed", "7", "--no-compile"])
        assert (config.seed, config.compile, config.out, stage) == (7, False, f"runs/{name}", "all")
    assert df.parse(flags(TINY))[0] == df.Config(**TINY, out="runs/shapes")


def test_presets_build_the_papers_models():
    """Parameter counts of the authors' models: spec, measured on their code."""
    config = df.Config(**df.PRESETS["imagenet-16"])
    with torch.device("meta"):
        tokenizer, ar = df.Tokenizer(config), df.ARTransformer(config)
    head = sum(p.numel() for p in tokenizer.align_head.parameters())  # theirs is counted with the teacher
    assert sum(p.numel() for p in tokenizer.parameters()) - head == 270_533_832
    assert sum(p.numel() for p in ar.parameters()) == 326_140_928


def test_wrong_command_lines_end_with_one_line_and_status_2(tmp_path, capsys):
    for argv in (
        ["--data", str(tmp_path / "nowhere")],
        ["--data", str(tmp_path)],
        ["--tok-batch", "0"],
        ["--device", "cuda:99"],
        ["--stage", "ar", "--out", str(tmp_path)],
        ["--stage", "eval", "--out", str(tmp_path)],
    ):
        assert df.main(["--out", str(tmp_path / "out"), *argv]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith("detailflow: "), (argv, error)
    with pytest.raises(SystemExit):
        df.main(["--no-such-flag"])


# == 3. Resolution mapping ==


def test_resolution_mapping_by_hand():
    config = df.Config(image_size=16, patch_size=4, num_tokens=5, group_size=1, causal_num=2, alpha=1.0)
    assert df.prefix_lengths(config) == [1, 2, 3, 4, 5]
    assert [df.resolution(config, n) for n in range(1, 6)] == [1, 4, 8, 12, 16]  # 1 + 15/4 (n - 1), cut
    assert [df.decoder_size(config, n) for n in range(1, 6)] == [4, 4, 8, 12, 16]
    assert df.best_prefix(config) == {4: 2, 8: 3, 12: 4, 16: 5}


@pytest.mark.skipif(not (SHARED / "resolution_map.json").exists(), reason="../shared is absent")
def test_resolution_mapping_equals_the_authors():
    for name, theirs in json.loads((SHARED / "resolution_map.json").read_text()).items():
        if name.startswith("_"):
            continue
        config = df.Config(
            image_size=theirs["image_size"],
            num_tokens=theirs["num_latent_tokens"],
            group_size=theirs["group_size"],
            alpha=theirs["power"],
            patch_size=theirs["dec_patch_size"],
        )
        assert {str(n): df.resolution(config, n) for n in df.prefix_lengths(config)} == theirs["token2res"]
        assert {str(n): df.decoder_size(config, n) for n in df.prefix_lengths(config)} == theirs["token2dec_out_res"]
        assert {str(k): v for k, v in df.best_prefix(config).items()} == theirs["decres2besttoken"]


def test_degraded_targets_run_from_the_mean_colour_to_the_image_itself(config):
    x = images()
    assert torch.equal(df.degrade(x, config, 12), x)
    first = df.degrade(x, config, 1)
    assert first.shape[2:] == (4, 4)
    torch.testing.assert_close(first, x.mean((2, 3), keepdim=True).expand_as(first))


# == 4. Mask ==


def test_mask_equals_the_one_drawn_in_its_docstring():
    rows = re.findall(r"\d \| ([1.](?: [1.])*)", df.group_causal_mask.__doc__)
    drawn = torch.tensor([[c == "1" for c in row.split()] for row in rows])
    assert torch.equal(df.group_causal_mask(6, 2, 2), drawn)


# == 5, 6. Transformer parts and quantiser ==


def test_patchify_puts_channels_last_and_unpatchify_undoes_it():
    x = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4)
    patches = df.patchify(x, 2)
    assert torch.equal(
        patches[1, 2], torch.stack([x[1, :, 2, 0], x[1, :, 2, 1], x[1, :, 3, 0], x[1, :, 3, 1]]).flatten()
    )
    assert torch.equal(df.unpatchify(patches, 2), x)


def test_quantiser_finds_the_nearest_code_and_passes_gradients_straight_through():
    torch.manual_seed(0)
    quantizer = df.Quantizer(30, 4, 0.25)
    z = torch.randn(2, 5, 4, requires_grad=True)
    out = quantizer(z)
    rows, unit = F.normalize(quantizer.codebook, dim=-1), F.normalize(z, dim=-1)
    distance = torch.cdist(unit, rows)
    assert torch.equal(out.codes, distance.argmin(-1))
    assert torch.equal(quantizer.nearest(unit, 6), distance.topk(6, largest=False).indices)
    torch.testing.assert_close(out.vectors, quantizer.lookup(out.codes))
    torch.testing.assert_close(out.error, 1.25 * distance.min(-1).values.square() / 4)
    weight = torch.randn_like(out.vectors)
    (through,) = torch.autograd.grad((out.vectors * weight).sum(), z, retain_graph=True)
    (direct,) = torch.autograd.grad((unit * weight).sum(), z)
    torch.testing.assert_close(through, direct)
    assert torch.equal(quantizer(rows[None]).codes[0], torch.arange(30))


def test_usage_and_perplexity_count_codes_and_revival_replaces_only_dead_ones():
    quantizer = df.Quantizer(8, 4, 0.25)
    quantizer.track(torch.tensor([[0, 0, 1, 1], [2, 2, 3, 3]]), CPU)
    used, perplexity = quantizer.usage()
    assert used == 0.5 and perplexity.item() == pytest.approx(4)
    before, latents = quantizer.codebook.clone(), F.normalize(torch.randn(3, 5, 4), dim=-1)
    quantizer.revive(latents, df.root_key(0, "test"), CPU)
    assert torch.equal(quantizer.codebook[:4], before[:4])
    for row in quantizer.codebook[4:]:
        assert (latents.flatten(0, 1) == row).all(-1).any()


# == 7. Tokenizer ==


def test_no_code_depends_on_later_groups(config, tokenizer):
    """The prefix property, by gradients: latent i moves with query j exactly where the mask allows."""
    queries = tokenizer.queries.detach().clone().requires_grad_()
    latents = tokenizer.encode_queries(queries, tokenizer.encode_patches(images(1)))
    for i in range(config.num_tokens):
        (moved,) = torch.autograd.grad(latents[0, i].sum(), queries, retain_graph=True)
        assert torch.equal(moved[0].abs().sum(-1) > 0, tokenizer.mask[i])


def test_encoding_fewer_queries_gives_the_same_first_codes(tokenizer):
    past = tokenizer.encode_patches(images())
    full = tokenizer.encode_queries(tokenizer.queries.expand(4, -1, -1), past)
    short = tokenizer.encode_queries(tokenizer.queries[:, :6].expand(4, -1, -1), past)
    torch.testing.assert_close(short, full[:, :6])


def test_every_allowed_prefix_decodes_at_its_size_and_no_other(config, tokenizer):
    codes = tokenizer.encode(images())
    assert codes.shape == (4, 12) and codes.dtype == torch.int64
    for n in range(1, 13):
        if n in df.prefix_lengths(config):
            assert tokenizer.decode(codes[:, :n]).shape == (
                4,
                3,
                df.decoder_size(config, n),
                df.decoder_size(config, n),
            )
        else:
            with pytest.raises(df.Refused, match="n in"):
                tokenizer.decode(codes[:, :n])
    assert tokenizer.decode(codes[:, :1], size=32).shape == (4, 3, 32, 32)
    assert tokenizer.encode(images(2, 24)[..., :20]).shape == (2, 12)  # another size, not square


@pytest.mark.parametrize(
    "call",
    [
        lambda t: t.encode(torch.zeros(1, 3, 15, 16)),
        lambda t: t.encode(torch.zeros(1, 3, 16, 16, dtype=torch.uint8)),
        lambda t: t.encode(torch.zeros(3, 16, 16)),
        lambda t: t.decode(torch.full((1, 12), 40)),
        lambda t: t.decode(torch.zeros(1, 12)),
        lambda t: t.decode(torch.zeros(1, 12, dtype=torch.long), size=6),
    ],
)
def test_tokenizer_refuses_what_it_can_not_do(tokenizer, call):
    with pytest.raises(df.Refused):
        call(tokenizer)


@pytest.mark.parametrize("start, end", [(0, 1), (2, 3), (3, 6), (6, 9)])
def test_self_correction_keeps_the_prefix_spoils_the_group_and_redoes_the_rest(config, tokenizer, start, end):
    past = tokenizer.encode_patches(images())
    clean = tokenizer.quantize(past)
    near = tokenizer.quantizer.nearest(clean.latents, config.noise_topk)
    ranks = torch.full((4, 3), 5)
    fixed = tokenizer.correct(past, clean, torch.full((4,), start), ranks)
    assert torch.equal(fixed.codes[:, :start], clean.codes[:, :start])
    assert torch.equal(fixed.codes[:, start:end], near[:, start:end, 5])
    assert torch.equal(fixed.labels[:, :end], clean.codes[:, :end])
    assert torch.equal(fixed.labels[:, end:], fixed.codes[:, end:])
    assert not torch.equal(fixed.codes[:, end:], clean.codes[:, end:])
    (gradient,) = torch.autograd.grad(
        fixed.vectors[:, :end].sum(), tokenizer.retry_queries, retain_graph=True, allow_unused=True
    )
    assert gradient is None or gradient.abs().max() == 0
    (gradient,) = torch.autograd.grad(
        fixed.vectors[:, end:].square().sum() + fixed.error.sum(), tokenizer.retry_queries
    )
    assert (gradient[0, end:] != 0).any(-1).all() and not gradient[0, :end].any()


def test_noise_falls_on_single_early_tokens_or_whole_groups_and_never_on_the_last_group(config):
    keys = df.fold(df.root_key(0, "test"), torch.arange(3000))
    start, ranks = df.draw_noise(config, keys, 12)
    assert set(start.tolist()) == {0, 1, 2, 3, 6} and set(ranks.flatten().tolist()) == set(range(8))
    assert abs((start == 6).float().mean() - 3 / 9) < 0.03
    assert set(df.draw_noise(config, keys, 3)[0].tolist()) == {0, 1, 2}
    assert df.draw_noise(config, keys, 1) == (None, None)


def test_prefixes_are_drawn_full_with_the_probability_asked_for(config):
    drawn = [df.draw_prefix(config, df.fold(df.root_key(0, "test"), i)) for i in range(2000)]
    assert {n for _, _, n in drawn} == set(df.prefix_lengths(config))
    assert {(side, count) for side, count, _ in drawn} == {(16, 12)}
    assert abs(sum(n < 12 for *_, n in drawn) / 2000 - config.coarse_prob) < 0.05


# == 9. AR transformer ==


@pytest.mark.parametrize("causal_num", [0, 3, 6])
def test_a_logit_depends_exactly_on_the_codes_of_earlier_groups(causal_num):
    config = df.Config(**TINY | {"causal_num": causal_num})
    torch.manual_seed(0)
    model = df.ARTransformer(config)
    torch.nn.init.normal_(model.output.weight)
    codes, labels = torch.randint(40, (1, 12)), torch.tensor([1])
    logits = model(labels, codes)
    for j in range(12):
        other = codes.clone()
        other[0, j] = (other[0, j] + 1) % 40
        moved = (model(labels, other) != logits).any(-1)[0]
        allowed = [i > j if i < causal_num else i // 3 > j // 3 for i in range(12)]
        assert moved.tolist() == allowed, j


def test_first_loss_is_that_of_a_blind_guess(config):
    model = df.ARTransformer(config)
    logits = model(torch.tensor([0, 1]), torch.randint(40, (2, 12)))
    assert F.cross_entropy(logits.flatten(0, 1), torch.zeros(24, dtype=torch.long)).item() == pytest.approx(
        math.log(40)
    )


def test_dropout_needs_keys_has_the_rate_and_the_scale(ar):
    x, keys = torch.ones(64, 30, 20), torch.arange(64)
    y = df.dropout(x, 0.25, keys, 3)
    assert y.unique().tolist() == pytest.approx([0, 4 / 3]) and abs((y == 0).float().mean() - 0.25) < 0.01
    assert torch.equal(df.dropout(x, 0.25, None, 3), x)
    labels, codes = torch.zeros(4, dtype=torch.long), torch.randint(40, (4, 12))
    keys = torch.arange(4)
    torch.testing.assert_close(ar(labels, codes, keys)[1:3], ar(labels[1:3], codes[1:3], keys[1:3]))
    assert not torch.allclose(ar(labels, codes, keys), ar(labels, codes))


# == 10. Generation ==


@pytest.mark.parametrize(
    "group, causal, guidance, schedule, temperature",
    [
        (3, 3, 1.0, "constant", 1.0),
        (3, 3, 2.0, "linear", 0.0),
        (3, 6, 1.5, "constant", 0.7),
        (1, 1, 1.5, "constant", 1.0),
        (3, 0, 1.5, "linear", 1.0),
    ],
)
def test_cached_generation_equals_the_slow_reference_in_g_plus_groups_minus_one_passes(
    monkeypatch, group, causal, guidance, schedule, temperature
):
    config = df.Config(**TINY | {"group_size": group, "causal_num": causal})
    torch.manual_seed(1)
    model = df.ARTransformer(config)
    torch.nn.init.normal_(model.output.weight, std=0.3)
    lengths, run = [], df.ARTransformer.run
    monkeypatch.setattr(
        df.ARTransformer, "run", lambda self, x, *rest: lengths.append(x.shape[1]) or run(self, x, *rest)
    )
    settings = {"guidance": guidance, "schedule": schedule, "temperature": temperature, "seeds": range(5)}
    fast = df.generate(model, torch.arange(5), **settings)
    assert len(lengths) == causal + (12 - causal) // group and sum(lengths) == 12
    assert torch.equal(fast, df.generate(model, torch.arange(5), **settings, slow=True))
    assert torch.equal(df.generate(model, torch.arange(5), **settings, num_tokens=6), fast[:, :6])


def test_generation_works_under_bfloat16_autocast(ar):
    with df.Machine(torch.device("cpu"), torch.bfloat16).autocast():
        fast, slow = (df.generate(ar, torch.arange(4), 1.5, temperature=0, slow=slow) for slow in (False, True))
    assert fast.shape == (4, 12) and (fast == slow).float().mean() > 0.5


def test_an_image_depends_on_its_seed_and_label_not_on_its_batch(ar):
    labels, seeds = torch.arange(6), torch.arange(100, 106)
    together = df.generate(ar, labels, 1.5, seeds=seeds)
    alone = torch.cat([df.generate(ar, labels[i : i + 1], 1.5, seeds=seeds[i : i + 1]) for i in range(6)])
    assert torch.equal(together, alone)
    assert not torch.equal(together, df.generate(ar, labels, 1.5, seeds=seeds + 1))


def test_guidance_mixes_the_two_logits_and_one_is_none(config, ar):
    y, null = torch.tensor([2, 5]), torch.tensor([10, 10])
    with torch.no_grad():
        first = [ar.run(ar.embed(labels, torch.zeros(2, 0, dtype=torch.long)))[:, 0] for labels in (y, null)]
    guided = df.generate(ar, y, 3.0, temperature=0, num_tokens=1)[:, 0]
    assert torch.equal(guided, (first[1] + 3 * (first[0] - first[1])).argmax(-1))
    assert torch.equal(df.generate(ar, y, 1.0, temperature=0, num_tokens=1)[:, 0], first[0].argmax(-1))
    assert [df.guidance_scale(config, i, 2.0, "linear") for i in (0, 2, 3, 9)] == [2.0, 2.0, 2 * 4 / 5, 2 * 2 / 5]


def test_codes_are_drawn_with_their_probabilities():
    p = torch.tensor([0.5, 0.25, 0.125, 0.125, 0])
    u = df.uniform(torch.arange(4000), 1)
    drawn = df.draw_codes(p.log().expand(4000, 1, 5), u)
    assert (drawn.flatten().bincount(minlength=5) / 4000 - p).abs().max() < 0.03
    edges = df.draw_codes(p.log().expand(1, 2, 5), torch.tensor([[0.0, 1 - 2**-24]]))
    assert edges.tolist() == [[0, 3]]  # never a code of probability 0
    cold = df.draw_codes(p.log().expand(4000, 1, 5), u, temperature=0.5).flatten().bincount(minlength=5) / 4000
    assert (cold - p.square() / p.square().sum()).abs().max() < 0.03


def test_top_k_keeps_ties_and_top_p_keeps_the_code_that_reaches_it():
    logits = torch.tensor([3.0, 2.0, 2.0, 1.0])
    assert (df.filter_logits(logits, top_k=2) > -math.inf).tolist() == [True, True, True, False]
    logits = torch.tensor([0.2, 0.5, 0.3]).log()
    assert (df.filter_logits(logits, top_p=0.6) > -math.inf).tolist() == [False, True, True]
    assert (df.filter_logits(logits, top_p=0.4) > -math.inf).tolist() == [False, True, False]


@pytest.mark.parametrize(
    "bad",
    [
        {"labels": torch.tensor([], dtype=torch.long)},
        {"labels": torch.tensor([11])},
        {"labels": torch.tensor([-1])},
        {"labels": torch.tensor([0.5])},
        {"guidance": -1},
        {"guidance": math.nan},
        {"temperature": math.nan},
        {"top_k": -1},
        {"top_p": 0},
        {"schedule": "cosine"},
        {"seeds": [1, 2]},
        {"num_tokens": 4},
    ],
)
def test_generate_refuses_impossible_requests(ar, bad):
    with pytest.raises(df.Refused, match=next(iter(bad))):
        df.generate(ar, **{"labels": torch.tensor([0])} | bad)


# == 7, 9, 10 against the authors' code ==


@pytest.fixture(scope="module")
def theirs():
    return torch.load(SHARED / "vectors/set1.pt", weights_only=True)


AUTHORS = {
    "image_size": 64,
    "num_tokens": 16,
    "group_size": 4,
    "patch_size": 16,
    "codebook_size": 64,
    "enc_width": 48,
    "enc_depth": 3,
    "enc_heads": 4,
    "enc_mlp": 96,
    "dec_width": 32,
    "dec_depth": 2,
    "dec_heads": 4,
    "ar_width": 64,
    "ar_depth": 3,
    "ar_heads": 4,
    "ar_mlp": 192,
}


def authors_tokenizer(weights):
    """Our tokenizer with their weights, their names translated."""
    names = {
        "encoder.latent_tokens": "queries",
        "encoder.refined_tokens": "retry_queries",
        "encoder.latent_pos_embed": "query_positions",
        "decoder.latent_pos_embed": "code_positions",
        "decoder.mask_token": "mask_token",
        "quantize.embedding.weight": "quantizer.codebook",
        "encoder.visual_model.embeddings.patch_embedding": "patch_embed",
        "quant_conv": "to_code",
        "post_quant_conv": "code_embed",
        "refine_conv": "from_code",
        "decoder.to_pixel.model": "to_pixels",
        ".visual_model.embeddings.position_embedding.weight": ".positions",
        ".visual_model.encoder.layers.": ".blocks.",
        ".visual_model.post_layernorm.": ".norm.",
        "layer_norm": "norm",
        "mlp.": "",
        "self_attn.out_proj": "out",
    }
    state = {"quantizer.counts": torch.zeros(64)}
    for name, tensor in weights.items():
        for old, new in names.items():
            name = name.replace(old, new) if not old.endswith("_conv") or name.startswith(old) else name
        state[name] = tensor
    for side, kind in itertools.product(
        [f"encoder.blocks.{i}" for i in range(3)] + [f"decoder.blocks.{i}" for i in range(2)], ("weight", "bias")
    ):
        state[f"{side}.qkv.{kind}"] = torch.cat([state.pop(f"{side}.self_attn.{x}_proj.{kind}") for x in "qkv"])
    del state["quantize.codebook_used"]
    model = df.Tokenizer(df.Config(**AUTHORS))
    model.load_state_dict(state)
    return model


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


@needs_shared
def test_tokenizer_equals_the_authors(theirs):
    v = theirs["tokenizer"]
    model = authors_tokenizer(v["state_dict"])
    with torch.no_grad():
        past = model.encode_patches(v["x"])
        clean = model.quantize(past)
        assert torch.equal(clean.codes, v["indices"]) and torch.equal(model.encode(v["x"]), v["indices"])
        close(clean.vectors, v["quant"])
        close(model.decode(v["indices"]), v["dec_full"])
        for prefix in v["prefix"].values():
            close(model.decode(v["indices"][:, : prefix["t"]]), prefix["pixels"])
        for n, target in v["targets"].items():
            close(df.degrade(v["x"], model.config, int(n)), target["image"])
        for noise in v["noise"]:
            start = noise["noise_idx"]
            ranks = F.pad(noise["topk_rank"], (0, 4))[:, start : start + 4]
            fixed = model.correct(past, clean, torch.full((2,), start), ranks)
            assert torch.equal(fixed.codes, noise["index_input"]) and torch.equal(fixed.labels, noise["index_label"])
            close(fixed.vectors, noise["quant"])
        for other in v["other_sizes"]:
            assert torch.equal(model.encode(other["x"]), other["indices"])
            close(model.decode(other["indices"][:, : other["t"]], other["pixels"].shape[-1]), other["pixels"])


@needs_shared
@pytest.mark.parametrize("case", range(4))
def test_training_losses_and_gradients_equal_the_authors(theirs, case):
    v = theirs["tokenizer"]
    model, step = authors_tokenizer(v["state_dict"]), v["train"][case]
    start, noise = step["noise_idx"], (None, None)
    if start >= 0:
        noise = torch.full((2,), start), F.pad(step["topk_rank"], (0, 4))[:, start : start + 4]
    out = model(v["x"], step["t"], *noise)
    target = df.degrade(v["x"], model.config, step["t"])
    total = F.mse_loss(out.pixels, target.repeat(len(out.pixels) // 2, 1, 1, 1)) + out.code_loss
    total.backward()
    assert total.item() == pytest.approx(step["total"], abs=2e-5)
    pairs = {
        "encoder.latent_tokens": model.queries,
        "quantize.embedding.weight": model.quantizer.codebook,
        "decoder.mask_token": model.mask_token,
        "encoder.latent_pos_embed": model.query_positions,
        "quant_conv.weight": model.to_code.weight,
    }
    if start >= 0:
        pairs |= {"encoder.refined_tokens": model.retry_queries, "refine_conv.weight": model.from_code.weight}
    for name, parameter in pairs.items():
        assert parameter.grad.norm().item() == pytest.approx(step["grad_norms"][name], rel=1e-4), name


@needs_shared
def test_ar_transformer_and_generation_equal_the_authors(theirs):
    v = theirs["ar"]
    names = {
        "cls_embedding.embedding_table": "class_embed",
        "tok_embeddings": "code_embed",
        "layers.": "blocks.",
        "attention.wqkv": "qkv",
        "attention.wo": "out",
        "feed_forward.": "",
        "attention_norm": "norm1",
        "ffn_norm": "norm2",
        "spe_code_embed.special_embeddings.weight": "specials",
    }
    state = {}
    for name, tensor in v["state_dict"].items():
        for old, new in names.items():
            name = name.replace(old, new)
        state[name] = tensor
    model = df.ARTransformer(df.Config(**AUTHORS))
    model.load_state_dict(state)
    assert torch.equal(model.mask, v["mask"])
    close(model.rotary, v["rope"][:16])
    with torch.no_grad():
        close(model(v["labels"], v["codes"]), v["logits"])
        for k, logits in v["prefix_logits"].items():
            close(model.run(model.embed(v["labels"], v["codes"][:, : int(k)])), logits)
    for run in v["generate"]:
        schedule = "linear" if run["gradual_cfg"] else "constant"
        for slow in (False, True):
            codes = df.generate(model, run["cond"], run["cfg_scale"], schedule, temperature=0, slow=slow)
            assert torch.equal(codes, run["tokens"].long())
    for case in v["filter"]:
        assert torch.equal(df.filter_logits(case["logits"], case["top_k"], case["top_p"]), case["filtered"])


# == 11. Data ==


def test_shapes_are_always_the_same_balanced_and_different_from_each_other():
    train = df.Shapes("train", 16)
    assert torch.equal(train[123][0], train.draw(torch.arange(120, 130))[3]) and train[123][1] == 3
    assert train[0][0].shape == (3, 16, 16) and train[0][0].dtype == torch.uint8
    assert not torch.equal(df.Shapes("val", 16)[0][0], train[0][0])
    assert len(train.draw(torch.arange(200)).flatten(1).unique(dim=0)) == 200


def test_eight_bit_rounding_is_exact_both_ways():
    x = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(df.to_uint8(df.to_float(x)), x)
    assert df.to_uint8(torch.tensor([-5.0, 5.0])).tolist() == [0, 255]


def make_folder(root, split=""):
    """Real files of every kind that folders hold: two classes, 24 files."""
    rng = np.random.default_rng(0)
    for i in range(24):
        folder = root / split / ("cat" if i % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8))
        mode, kind = [
            ("RGB", "jpg"),
            ("L", "png"),
            ("P", "png"),
            ("RGBA", "png"),
            ("CMYK", "jpg"),
            ("LA", "png"),
            ("1", "png"),
            ("I;16", "png"),
        ][i % 8]
        if mode == "I;16":
            image = Image.fromarray(rng.integers(0, 65536, (20, 30), dtype=np.uint16))
        image = image.resize((300, 200)) if i == 0 else image.resize((3, 2)) if i == 8 else image
        (image if mode == "I;16" else image.convert(mode)).save(folder / f"{i:03d}.{kind}")


@pytest.mark.parametrize("split", ["", "train"])
def test_folders_of_all_kinds_of_images_are_read(tmp_path, split):
    make_folder(tmp_path, split)
    if split:
        make_folder(tmp_path, "val")
    config = df.Config(**TINY | {"data": str(tmp_path)})
    train, val = df.open_data(config, CPU, "train"), df.open_data(config, CPU, "val")
    assert train.classes == ["cat", "dog"] and (len(train), len(val)) == ((24, 24) if split else (23, 1))
    step, x, _ = next(df.training_batches(config, CPU, df.open_data(config, CPU, "train", share=0.8), 5, 6))
    assert step == 5 and x.shape == (8, 3, 16, 16) and -1 <= x.min() < x.max() <= 1


def test_streamed_and_interrupted_batches_are_the_same_as_before(tmp_path):
    make_folder(tmp_path)
    config = df.Config(**TINY | {"data": str(tmp_path), "workers": 1})
    data = df.open_data(config, CPU, "train", share=0.8)
    whole = list(df.training_batches(config, CPU, data, 0, 5))
    rest = list(df.training_batches(config, CPU, data, 3, 5))
    assert all(torch.equal(a[1], b[1]) for a, b in zip(whole[3:], rest, strict=True))


def test_centre_crop_is_adms():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (150, 101, 3), dtype=np.uint8))
    half = image.resize((50, 75), Image.BOX)  # 101 >= 2 * 32: halved once; then 32 / 50
    small = np.array(half.resize((32, 48), Image.BICUBIC))
    assert np.array_equal(np.array(df.crop(image, 32)), small[8:40])


def test_two_ranks_see_the_batch_of_one_process(config):
    whole = df.batch_rows(config, CPU, "ar", 7, 8, 30)
    halves = [df.batch_rows(config, df.Machine(CPU.device, rank=r, world=2), "ar", 7, 8, 30) for r in (0, 1)]
    for one, a, b in zip(whole, *halves, strict=True):
        assert torch.equal(one, torch.cat([a, b]))
    seen = torch.cat([df.batch_rows(config, CPU, "ar", step, 10, 30)[0] for step in range(3)])
    assert sorted(seen.tolist()) == list(range(30))  # an epoch sees each image once


# == 12 to 14. Training ==


def test_learning_rate_end_points():
    assert df.learning_rate(0, 100, 10, 1.0, 0.1, 0.01) == pytest.approx(0.1)
    assert df.learning_rate(5, 100, 10, 1.0, 0.1, 0.01) == pytest.approx(0.55)
    assert df.learning_rate(50, 100, 10, 1.0, 0.1, 0.01) == pytest.approx(0.505)
    assert df.learning_rate(100, 100, 10, 1.0, 0.1, 0.01) == pytest.approx(0.01)


def run(out, *more, expect=0, **settings):
    argv = flags(TINY | {"out": out, "log_every": 2, "save_every": 2, "tok_steps": 6, "ar_steps": 6} | settings)
    assert df.main([*argv, *more]) == expect


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    run(out, disc_weight=0.2, disc_start=3)
    return out


def test_a_run_leaves_checkpoints_pictures_a_log_and_results(trained):
    assert {
        "tokenizer.pt",
        "ar.pt",
        "log.jsonl",
        "results.json",
        "samples.png",
        "reconstructions.png",
        "coarse_to_fine.png",
        "tokenizer_0000006.png",
        "ar_0000006.png",
    } <= set(os.listdir(trained))
    log = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in log if "pixel_loss" in r] == [2, 4, 6] and log[0]["config"]["num_tokens"] == 12
    assert [r["step"] for r in log if "held_out_loss" in r] == [2, 4, 6]
    results = json.loads((trained / "results.json").read_text())
    assert results["ar"]["ln_V"] == pytest.approx(math.log(40), abs=1e-4) and "fid" not in results
    with Image.open(trained / "samples.png") as picture:
        assert picture.size == (8 * 66 + 2, 10 * 66 + 2)


def weights(path):
    state = torch.load(path, weights_only=True)
    return {f"{part}.{k}": v for part in ("model", "ema", "judge") if part in state for k, v in state[part].items()}


def test_a_resumed_run_ends_with_the_same_bits(trained, tmp_path, monkeypatch):
    """Interrupted after any step, by an exception that leaves no time for anything: as SIGKILL would."""
    for stage, at in (("tokenizer", 3), ("ar", 5)):
        count, step = [0], df.Progress.step

        def stop(self, *args, stage=stage, at=at, count=count, step=step, **values):
            due = step(self, *args, **values)
            count[0] += self.stage == stage
            if count[0] == at:
                raise KeyboardInterrupt
            return due

        with monkeypatch.context() as patch:
            patch.setattr(df.Progress, "step", stop)
            run(tmp_path, expect=130, disc_weight=0.2, disc_start=3)
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"stage": "ar", "st')  # a line torn by the kill
    run(tmp_path, disc_weight=0.2, disc_start=3)
    for name in ("tokenizer.pt", "ar.pt"):
        once, twice = weights(trained / name), weights(tmp_path / name)
        assert once.keys() == twice.keys() and all(torch.equal(once[k], twice[k]) for k in once), name
    steps = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in steps if "pixel_loss" in r] == [2, 4, 6]  # none twice


def test_other_settings_or_another_tokenizer_are_refused_not_mixed(trained, tmp_path, capsys):
    run(trained, expect=2, disc_weight=0.2, disc_start=3, tok_lr=0.5)
    assert "tok_lr 0.002 -> 0.5" in capsys.readouterr().err
    for name in ("tokenizer.pt", "ar.pt"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    state = torch.load(tmp_path / "tokenizer.pt", weights_only=True)
    state["ema"]["to_code.bias"] += 1
    torch.save(state, tmp_path / "tokenizer.pt")
    run(tmp_path, "--stage", "eval", expect=2)
    assert "another tokenizer" in capsys.readouterr().err


def test_codes_are_extracted_once_and_hold_what_the_tokenizer_says(trained, config):
    tokenizer, _ = df.load_model(trained / "tokenizer.pt", "tokenizer")
    (path,) = trained.glob("codes-*.npy")
    codes = np.load(path, mmap_mode="r")
    assert len(codes) == 20000 and np.array_equal(codes["label"][:20], np.arange(20) % 10)
    x = images(20)
    assert np.array_equal(codes["codes"][:20, 0, 0], tokenizer.encode(x).numpy())
    assert np.array_equal(codes["codes"][:20, 1, 0], tokenizer.encode(x.flip(3)).numpy())
    labels, shown, target, _ = df.ar_batch(config, CPU, codes, 0)
    assert labels.shape == (8,) and shown.shape == target.shape == (8, 12)
    shares = [
        (shown != target).any(1).float().mean()
        for _, shown, target, _ in (df.ar_batch(config, CPU, codes, i) for i in range(60))
    ]
    assert 0.2 < np.mean(shares) < 0.35  # 30%, less those whose noise happened to be the clean code


def test_broken_checkpoints_are_named(trained, tmp_path):
    whole = (trained / "tokenizer.pt").read_bytes()
    path = tmp_path / "tokenizer.pt"
    for content in (whole[: len(whole) // 2], b"hello", b""):
        path.write_bytes(content)
        with pytest.raises(df.Refused, match=r"tokenizer\.pt"):
            df.load_model(path, "tokenizer")
    with pytest.raises(df.Refused, match="not a checkpoint of the ar stage"):
        df.load_model(trained / "tokenizer.pt", "ar")


def test_two_processes_train_like_one(tmp_path):
    """torchrun, gloo, both stages: the weights agree to float rounding, dropout and noise included."""
    command = flags(TINY | {"tok_steps": 4, "ar_steps": 4, "disc_weight": 0.2, "disc_start": 2})
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, start in (("one", [sys.executable]), ("two", launch)):
        for stage in ("tokenizer", "ar"):
            subprocess.run(
                [*start, "detailflow.py", *command, "--stage", stage, "--out", str(tmp_path / name)],
                cwd=HERE,
                env=env,
                check=True,
                capture_output=True,
                timeout=120,
            )
    for name in ("tokenizer.pt", "ar.pt"):
        one, two = weights(tmp_path / "one" / name), weights(tmp_path / "two" / name)
        for k in one:
            # The mean, for Adam blows single gradients that are pure rounding up to steps of the learning rate, 2e-3.
            assert (two[k].float() - one[k].float()).abs().mean() < 3e-5, (name, k)


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path):
    for accum in (1, 2):
        run(tmp_path / str(accum), "--stage", "tokenizer", accum=accum, tok_steps=2, coarse_prob=0.0)
    one, two = (weights(tmp_path / str(accum) / "tokenizer.pt") for accum in (1, 2))
    torch.testing.assert_close(one["model.to_pixels.weight"], two["model.to_pixels.weight"], rtol=1e-3, atol=1e-5)


def test_tokenizer_learns_eight_images_by_heart(config):
    x = images(8)
    torch.manual_seed(0)
    model = df.Tokenizer(config)
    optimizers = df.Optimizers(model, "muon", 3e-3)
    for step in range(150):
        out = model(x, 12, *df.draw_noise(config, df.fold(df.root_key(0, "test"), torch.arange(8) + 8 * step), 12))
        loss = F.mse_loss(out.pixels, x.repeat(2, 1, 1, 1)) + out.code_loss
        loss.backward()
        optimizers.step(3e-3)
    assert df.psnr(model.decode(model.encode(x)), x).mean() > 17


def test_ar_transformer_learns_four_sequences_by_heart(config, ar):
    codes, labels = torch.randint(40, (4, 12), generator=torch.Generator().manual_seed(0)), torch.arange(4)
    optimizers = df.Optimizers(ar, "adamw", 3e-3)
    for _ in range(80):
        loss = F.cross_entropy(ar(labels, codes).flatten(0, 1), codes.flatten())
        loss.backward()
        optimizers.step(3e-3)
    assert loss < 0.1
    assert torch.equal(df.generate(ar, labels, temperature=0), codes)


def test_muon_takes_torchs_steps():
    """torch.optim.Muon works in bfloat16: equal to a few hundredths of a step."""
    ours, theirs = torch.nn.Linear(6, 4, bias=False), torch.nn.Linear(6, 4, bias=False)
    theirs.load_state_dict(ours.state_dict())
    optimizers = [
        df.Muon([{"params": [ours.weight]}], {"lr": 0.02, "weight_decay": 0.1}),
        torch.optim.Muon([theirs.weight], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ]
    before, x = ours.weight.detach().clone(), torch.randn(5, 6)
    for _ in range(3):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).sin().sum().backward()
            optimizer.step()
    moved = ours.weight - before
    assert (ours.weight - theirs.weight).norm() < 0.05 * moved.norm()


def test_moving_average_warms_up():
    model, ema = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    torch.nn.init.ones_(model.weight)
    torch.nn.init.zeros_(ema.weight)
    df.update_ema(ema, model, 0.9, 0)
    assert ema.weight.item() == pytest.approx(0.9)  # d = (1 + 0) / (10 + 0)
    df.update_ema(ema, model, 0.9, 10**6)
    assert ema.weight.item() == pytest.approx(0.91)  # d = 0.9


# == 16. FID ==


def test_frechet_distance_has_its_closed_forms():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(50, 6))
    mu, sigma = a.mean(0), np.cov(a.T)
    assert df.frechet_distance(mu, sigma, mu, sigma) == pytest.approx(0, abs=1e-9)
    assert df.frechet_distance(mu, sigma, mu + 2, sigma) == pytest.approx(24)  # |shift|^2
    assert df.frechet_distance(mu, sigma, mu, 9 * sigma) == pytest.approx(4 * np.trace(sigma))  # (3 - 1)^2 tr S
    b = rng.normal(size=(50, 6)) @ rng.normal(size=(6, 6))
    other = np.cov(b.T)
    direct = np.trace(sigma + other - 2 * scipy.linalg.sqrtm(sigma @ other).real)
    assert df.frechet_distance(mu, sigma, mu, other) == pytest.approx(direct)
    assert df.frechet_distance(mu, other, mu, sigma) == pytest.approx(direct)
    flat = np.outer(mu, mu)  # of rank one: roots of zero eigenvalues
    assert df.frechet_distance(mu, flat, mu, 4 * flat) == pytest.approx(np.trace(flat), rel=1e-6)
    with pytest.raises(df.Refused):
        df.frechet_distance(mu, sigma, mu[:3], sigma[:3, :3])


def test_resize_is_tensorflows():
    x = torch.rand(1, 2, 5, 7)
    y = df.tf_resize(x, 11)[0, 1]
    for i, j in itertools.product(range(11), repeat=2):  # position i * in / out, clamped neighbour
        (r, s), (c, t) = divmod(i * 5 / 11, 1), divmod(j * 7 / 11, 1)
        r, c, z = int(r), int(c), x[0, 1]
        below, right = min(r + 1, 4), min(c + 1, 6)
        value = (z[r, c] * (1 - t) + z[r, right] * t) * (1 - s) + (z[below, c] * (1 - t) + z[below, right] * t) * s
        assert y[i, j].item() == pytest.approx(value.item(), abs=1e-5)


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """Random weights of the published file's names and shapes."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    net = torchvision.models.inception.Inception3(1008, aux_logits=False, init_weights=False)
    state = net.state_dict()
    for name in state:
        if name.startswith("Mixed_7c") and name.endswith("bn.weight"):
            state[name] *= 100  # features of a size that matters
    torch.save(state, path)
    return path


def test_inception_pools_as_fid_wants(inception_file, tmp_path):
    net = df.InceptionV3(inception_file)
    features, logits = net(torch.randint(256, (2, 3, 40, 40), dtype=torch.uint8))
    assert features.shape == (2, 2048) and logits.shape == (2, 1008)
    for name, pool in (
        ("5b", lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)),
        ("7c", lambda x: F.max_pool2d(x, 3, 1, 1)),
    ):
        block, seen = getattr(net.net, f"Mixed_{name}"), []
        hook = block.branch_pool.conv.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        x = torch.randn(1, {"5b": 192, "7c": 2048}[name], 6, 6)
        block(x)
        hook.remove()
        assert torch.equal(seen[0], pool(x))
    with pytest.raises(df.Refused, match="uint8"):
        net(torch.zeros(1, 3, 40, 40))
    (tmp_path / "other.pth").write_bytes(b"no")
    with pytest.raises(df.Refused, match=r"other\.pth"):
        df.InceptionV3(tmp_path / "other.pth")


def test_moments_do_not_depend_on_the_batches():
    class Fake(torch.nn.Module):
        fc = torch.nn.Linear(1, 1008)

        def forward(self, pixels):
            x = pixels.flatten(1)[:, :64].float() / 99
            return x.repeat(1, 32), x.repeat(1, 16)[:, :1008]

    pixels = torch.randint(256, (50, 3, 8, 8), dtype=torch.uint8)
    results = []
    for batch in (50, 7):
        moments = df.Moments(CPU, 50)
        for rows in torch.arange(50).split(batch):
            moments.add(Fake(), rows.tolist(), pixels[rows])
        results.append(moments.finish(CPU))
    mean, covariance, score = results[0]
    features, logits = (t.double().detach().numpy() for t in Fake()(pixels))
    np.testing.assert_allclose(mean, features.mean(0))
    np.testing.assert_allclose(covariance, np.cov(features.T), atol=1e-8)
    p = scipy.special.softmax(logits - Fake.fc.bias.detach().numpy(), 1)
    assert score == pytest.approx(np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean()), rel=1e-5)
    np.testing.assert_allclose(results[1][1], covariance, atol=1e-10)


def test_fid_is_measured_with_its_protocol_and_never_without_weights(
    trained, tmp_path, inception_file, monkeypatch, capsys
):
    monkeypatch.setattr(df, "CACHE", tmp_path)
    monkeypatch.setitem(df.WEIGHTS, df.INCEPTION, ("http://127.0.0.1:9/inception.pth", "00"))
    run(trained, "--stage", "eval", inception="auto")
    assert "FID: not measured: http://127.0.0.1:9/inception.pth can't be downloaded" in capsys.readouterr().out
    assert "fid" not in json.loads((trained / "results.json").read_text())
    val = df.open_data(df.Config(**TINY), CPU, "val")
    val.pixels, val.labels = val.pixels[:6], val.labels[:6]
    monkeypatch.setattr(df, "open_data", lambda *args, **kwargs: val)
    run(trained, "--stage", "eval", inception=inception_file, eval_samples=6, eval_batch=3)
    assert "is not comparable" in capsys.readouterr().out
    fid = json.loads((trained / "results.json").read_text())["fid"]
    assert (
        fid["generation_fid"] > 0
        and fid["protocol"]["inception_sha256"] == hashlib.sha256(inception_file.read_bytes()).hexdigest()
    )
    assert fid["protocol"]["samples"] == 6 and fid["protocol"]["guidance"] == 2.0


# == sample.py ==


def test_sample_draws_grids_strips_npz_and_rebuilds_a_picture(trained, tmp_path):
    assert (
        sample.main(
            ["--run", str(trained), "--out", str(tmp_path), "--classes", "ring", "3", "--num", "6", "--guidance", "2"]
        )
        == 0
    )
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.size == (3 * 66 + 2, 2 * 66 + 2)
    assert (tmp_path / "coarse_to_fine.png").exists()
    draw = ["--run", str(trained), "--num", "20", "--npz"]
    assert sample.main([*draw, str(tmp_path / "a.npz"), "--batch", "20"]) == 0
    assert sample.main([*draw, str(tmp_path / "b.npz"), "--batch", "3"]) == 0
    a, b = np.load(tmp_path / "a.npz"), np.load(tmp_path / "b.npz")
    assert a["arr_0"].shape == (20, 16, 16, 3) and a["arr_0"].dtype == np.uint8
    assert np.bincount(a["arr_1"]).tolist() == [2] * 10
    assert np.abs(a["arr_0"].astype(int) - b["arr_0"]).max() <= 1  # float rounding of the decoder
    Image.new("RGB", (50, 40), "red").save(tmp_path / "red.png")
    assert sample.main(["--run", str(trained), "--out", str(tmp_path), "--image", str(tmp_path / "red.png")]) == 0
    assert (tmp_path / "rebuilt.png").exists()


def test_sample_says_in_one_line_what_is_wrong(trained, tmp_path, capsys):
    for argv, word in (
        (["--run", str(tmp_path)], "python detailflow.py --out"),
        (["--classes", "dragon"], "dragon"),
        (["--num", "0"], "at least 1"),
        (["--image", str(tmp_path / "no.png")], "no.png"),
        (["--guidance", "-1"], "guidance"),
        (["--tokens", "4"], "num_tokens"),
    ):
        assert sample.main(["--run", str(trained), "--out", str(tmp_path), *argv]) == 2
        error = capsys.readouterr().err
        assert word in error and error.count("\n") == 1


def test_readme_commands_parse():
    for line in re.findall(
        r"^(?:python|torchrun .*?) (detailflow|sample)\.py(.*)$", (HERE / "README.md").read_text(), re.M
    ):
        {"detailflow": df.parse, "sample": sample.parse}[line[0]](line[1].split("#")[0].split())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_agrees_with_cpu(config, tokenizer, ar):
    x, labels, codes = images(), torch.arange(4), torch.randint(40, (4, 12))
    with torch.no_grad():
        torch.testing.assert_close(
            ar.cuda()(labels.cuda(), codes.cuda()).cpu(), ar.cpu()(labels, codes), rtol=1e-3, atol=1e-3
        )
    with torch.autocast("cuda", torch.bfloat16):
        out = tokenizer.cuda()(x.cuda(), 12)
    out.pixels.mean().backward()
    assert out.pixels.isfinite().all() and all(
        p.grad is None or p.grad.isfinite().all() for p in tokenizer.parameters()
    )
