"""The pocket model's training: data, exactness, and that a kill costs minutes, not hours."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from pocket.attention import attend  # noqa: E402
from pocket.batches import HardGroups, ScenePictures, stream  # noqa: E402
from pocket.checkpoints import LONGEST_STEP, Clock, save_atomically  # noqa: E402
from pocket.damage import LADDERS  # noqa: E402
from pocket.inner import inner_levels, pass_inwards, pool  # noqa: E402
from pocket.scenes import caption, render, sample_scene  # noqa: E402
from pocket.scores import SHOWN, Judge, ladders, unseen  # noqa: E402
from pocket.settings import Settings  # noqa: E402
from pocket.tokenizer import build_tokenizer, words  # noqa: E402
from pocket.unet import build_unet, shares  # noqa: E402
from pocket.vae import build_vae, encode, latents_of  # noqa: E402
from pocket.variants import ATTRIBUTES, variants_of  # noqa: E402

SETTINGS = Settings(
    out=SCRIPTS.parent / "agentsd" / "pocket", work=Path("unused"), device=torch.device("cpu")
)


def scenes(count: int, seed: int = 0) -> list:
    """Scenes 0 to count - 1 of a seed's stream."""
    return [sample_scene(np.random.default_rng((seed, i))) for i in range(count)]


class TestScenes:
    def test_same_seed_same_pictures_and_captions(self):
        first, second = ScenePictures(7, 32), ScenePictures(7, 32)
        for i in range(50):
            (one, text), (two, again) = first[i], second[i]
            assert text == again
            assert torch.equal(one, two)

    def test_another_seed_gives_other_scenes(self):
        assert scenes(20) != scenes(20, seed=1)

    def test_a_stream_goes_on_where_it_was(self):
        whole = stream(ScenePictures(3, 32), 4)
        next(whole)
        rest = stream(ScenePictures(3, 32, first=4), 4)
        (pictures, captions), (same, texts) = next(whole), next(rest)
        assert captions == texts
        assert torch.equal(pictures, same)

    def test_the_layout_is_the_same_at_every_size(self):
        for scene in scenes(20):
            small, large = render(scene, 64).astype(float), render(scene, 256).astype(float)
            shrunk = large.reshape(64, 4, 64, 4, 3).mean((1, 3))
            assert np.abs(small - shrunk).mean() < 2.0

    def test_the_background_colour_fills_the_corners(self):
        for scene in scenes(200):
            picture = render(scene, 64)
            corners = picture[[0, 0, -1, -1], [0, -1, 0, -1]]
            assert (corners == corners[0]).all(), caption(scene)


class TestVariants:
    @pytest.mark.parametrize("attribute", ATTRIBUTES)
    def test_a_variant_says_something_else_of_the_same_length(self, attribute):
        found = [(s, v) for s in scenes(300) for v in variants_of(s, attribute)]
        assert found
        for scene, changed in found:
            own, other = caption(scene).split(), caption(changed).split()
            assert own != other
            if attribute in ("colour", "background", "shape", "count"):
                differing = [pair for pair in zip(own, other, strict=True) if pair[0] != pair[1]]
                named = [pair for pair in differing if set(pair) != {"a", "an"}]
                assert len(named) == 1

    def test_an_unknown_attribute_is_an_error(self):
        with pytest.raises(ValueError, match="colour, background, shape"):
            variants_of(scenes(1)[0], "smell")

    def test_groups_hold_four_different_captions(self):
        for i in range(100):
            pictures, captions, labels, where = HardGroups(0, 32)[i]
            assert pictures.shape == (4, 3, 32, 32)
            assert labels.shape == (4, 6)
            assert where.shape == (4, 8, 8)
            assert where.flatten(1).any(1).all()
            assert len(set(captions)) == 4


class TestTokenizer:
    def test_thousands_of_captions_come_back_word_for_word(self, tmp_path):
        tokenizer = build_tokenizer(tmp_path)
        for text in {*SHOWN, *(caption(s) for s in scenes(4000))}:
            ids = tokenizer(text).input_ids
            assert len(ids) == len(text.split()) + 2 <= tokenizer.model_max_length
            assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text

    def test_no_two_words_share_a_token(self, tmp_path):
        tokenizer = build_tokenizer(tmp_path)
        assert len({tokenizer(word).input_ids[1] for word in words()}) == len(words())

    def test_words_it_never_saw_become_several_tokens(self, tmp_path):
        assert len(build_tokenizer(tmp_path)("zeppelin").input_ids) > 3


class TestAttention:
    @staticmethod
    def both(method, tokens: int) -> list[torch.Tensor]:
        random = torch.Generator().manual_seed(0)
        shape = (3, 2, 2, tokens, 8)
        parts = torch.randn(shape, generator=random, dtype=torch.float64).requires_grad_()
        output = method(*parts)
        (gradient,) = torch.autograd.grad(output.square().sum(), parts)
        return [output, gradient]

    @pytest.mark.parametrize("tokens", [1, 63, 256, 700])
    def test_blocks_equal_plain_attention_and_its_gradients(self, tokens):
        ours, plain = self.both(attend, tokens), self.both(F.scaled_dot_product_attention, tokens)
        for mine, theirs in zip(ours, plain, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)

    def test_a_wrong_scale_is_noticed(self):
        wrong = self.both(lambda q, k, v: attend(q * 1.01, k, v), 256)[0]
        plain = self.both(F.scaled_dot_product_attention, 256)[0]
        assert not torch.allclose(wrong, plain, rtol=1e-4, atol=1e-4)


class TestEncoder:
    def pictures(self) -> torch.Tensor:
        drawn = np.stack([render(scene, 128) for scene in scenes(4)])
        return torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1

    @pytest.mark.parametrize(
        ("dtype", "limit"), [(torch.float32, 2e-3), (torch.float16, 5e-3), (torch.bfloat16, 3e-2)]
    )
    def test_latents_are_mean_colours(self, dtype, limit):
        vae, pictures = build_vae().to(dtype), self.pictures()
        with torch.no_grad():
            found = encode(vae, pictures.to(dtype)).float()
        assert (found - latents_of(pictures)).abs().max() < limit

    def test_a_trained_one_s_group_norm_would_be_noticed(self):
        """Without the large constants the last norm divides by the picture's own spread."""
        vae, pictures = build_vae(), self.pictures()
        with torch.no_grad():
            vae.encoder.down_blocks[2].resnets[0].conv_shortcut.bias.mul_(0.02)
            vae.encoder.conv_out.weight.mul_(0.02)
            found = encode(vae, pictures)
        assert (found - latents_of(pictures)).abs().max() > 0.1

    def test_a_colour_means_the_same_at_every_size(self):
        pictures = self.pictures()
        smaller = F.avg_pool2d(pictures, 2)
        torch.testing.assert_close(latents_of(smaller), pool(latents_of(pictures), 1))


class TestInnerLevels:
    @pytest.mark.parametrize("level", [1, 2])
    def test_see_at_first_what_the_whole_hands_them(self, level):
        torch.manual_seed(0)
        unet = build_unet(smoke=True)
        pass_inwards(unet)
        inner = inner_levels(unet, level)
        seen = []
        unet.down_blocks[level].resnets[0].register_forward_pre_hook(
            lambda _, args: seen.append(args[0])
        )
        latents, text, times = torch.randn(2, 4, 32, 32), torch.randn(2, 7, 128), torch.tensor(500)
        with torch.no_grad():
            unet(latents, times, text)
            inner(pool(latents, level), times, text)
            inner(pool(latents.flip(0), level), times, text)
        torch.testing.assert_close(seen[0], seen[1])
        assert not torch.allclose(seen[0], seen[2], atol=0.1)

    def test_share_their_weights_with_the_whole(self):
        unet = build_unet(smoke=True)
        whole = {id(p) for p in unet.parameters()}
        own = [name for name, p in inner_levels(unet, 2).named_parameters() if id(p) not in whole]
        assert {name.partition(".")[0] for name in own} == {"conv_norm_out", "conv_out"}


class TestScorer:
    """Of the model that comes with agentsd."""

    @pytest.fixture(scope="class")
    def judge(self) -> Judge:
        return Judge.exported(SETTINGS)

    def test_renders_beat_captions_that_differ_in_one_attribute(self, judge):
        found = unseen(SETTINGS, 200)
        images = [Image.fromarray(render(scene, 256)) for scene in found]
        right = judge.judge(found, images)["attributes"]
        assert right.keys() == set(ATTRIBUTES)
        assert all(told["right"] > 0.85 for told in right.values()), right
        wrong = judge.judge(found, images[1:] + images[:1])["attributes"]
        assert all(told["right"] < 0.7 for told in wrong.values()), wrong

    def test_its_features_see_damage_grow(self, judge):
        found = ladders(judge, unseen(SETTINGS, 240))
        assert set(found) == set(LADDERS)
        whole = {next(iter(steps.values()))["FID"] for steps in found.values()}
        assert len(whole) == 1  # every ladder begins with the same renders
        for kind, steps in found.items():
            distances = [figures["FID"] for figures in steps.values()]
            assert distances == sorted(distances), (kind, distances)
            assert distances[-1] > 1.3 * distances[0], (kind, distances)


class TestSchedule:
    def test_inner_levels_come_first_and_the_whole_has_the_last_third(self):
        path = [shares(i / 100) for i in range(101)]
        assert all(sum(odds.values()) == pytest.approx(1) for odds in path)
        assert all(odds[2] > 0.9 for odds in path[:40])
        assert all(odds[0] > 0.8 for odds in path[66:])

    def test_the_clock_keeps_what_was_spent_and_forgives_a_pause(self, monkeypatch):
        now = [100.0]
        monkeypatch.setattr(time, "monotonic", lambda: now[0])
        clock = Clock(budget=1000, spent=500)
        now[0] += 1
        assert clock.tick() == pytest.approx(0.501)
        now[0] += 3600
        assert clock.tick() == pytest.approx((501 + LONGEST_STEP) / 1000)


def test_a_failed_save_leaves_the_checkpoint_whole(tmp_path, monkeypatch):
    path = tmp_path / "unet.pt"
    save_atomically({"step": 1}, path)

    def broken(state: dict, file: Path) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        save_atomically({"step": 2}, path)
    assert torch.load(path, weights_only=True)["step"] == 1


def command(folder: Path, *more: str) -> list[str]:
    """The smoke run's command line into a folder."""
    given = ["--smoke", "--device", "cpu", "--threads", "2"]
    places = ["--out", str(folder / "out"), "--work", str(folder / "work")]
    return [sys.executable, str(SCRIPTS / "train_pocket.py"), *given, *places, *more]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> Path:
    """A folder in which the smoke run went from nothing to figures."""
    folder = tmp_path_factory.mktemp("pocket")
    run = subprocess.run(command(folder), capture_output=True, text=True, timeout=200, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert '"best of 64"' in run.stdout
    return folder


class TestCommand:
    def test_the_exported_folder_makes_an_image(self, smoke):
        from diffusers import DiffusionPipeline

        pipe = DiffusionPipeline.from_pretrained(smoke / "out")
        assert type(pipe).__name__ == "StableDiffusionPipeline"
        assert pipe.unet.config.sample_size == 64
        assert pipe.vae_scale_factor == 4
        image = pipe(SHOWN[0], num_inference_steps=2, height=64, width=64).images[0]
        assert image.size == (64, 64)

    def test_it_shows_how_far_it_came(self, smoke):
        lines = (smoke / "work" / "scores.csv").read_text().splitlines()
        names = {line.split(",")[2] for line in lines}
        assert {f"level {level} cosine" for level in (0, 1, 2)} <= names
        for file in ("unet.png", "level-0.jpg", "level-1.jpg", "level-2.jpg"):
            with Image.open(smoke / "work" / file) as picture:
                assert picture.getextrema() != ((0, 0),) * 3

    def test_it_names_no_folder_of_the_machine(self, smoke):
        for file in (smoke / "out").rglob("*.json"):
            assert str(smoke) not in file.read_text(), file

    def test_a_killed_run_goes_on_from_its_checkpoint(self, smoke, tmp_path):
        shutil.copytree(smoke / "work", tmp_path / "work")
        kept = tmp_path / "work" / "unet.pt"
        start = torch.load(kept, weights_only=True)["step"]
        unet = ("--stage", "unet", "--save-every", "0")
        endless = command(tmp_path, *unet, "--steps", "1000000", "--hours", "1")
        run = subprocess.Popen(endless, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while torch.load(kept, weights_only=True)["step"] < start + 3:
            assert time.monotonic() < deadline
            assert run.poll() is None
            time.sleep(0.3)
        os.kill(run.pid, signal.SIGKILL)
        run.wait()

        killed = torch.load(kept, weights_only=True)
        last = killed["step"] + 2
        again = command(tmp_path, *unet, "--steps", str(last), "--hours", "1")
        done = subprocess.run(again, capture_output=True, text=True, timeout=100, check=False)
        assert f"unet: resumed at step {killed['step']}" in done.stderr
        final = torch.load(kept, weights_only=True)
        assert final["step"] == last
        assert final["spent"] > killed["spent"] > 0
        assert final["average"]["steps"] == killed["average"]["steps"] + 2
        adam = next(iter(final["optimiser"]["state"].values()))
        assert int(adam["step"]) == last
