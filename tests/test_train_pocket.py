"""The pocket model's training: data, exactness, and that a kill costs minutes, not hours."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from pocket.attention import attend  # noqa: E402
from pocket.batches import CELL, KINDS, CloseUps, HardGroups, ScenePictures, stream  # noqa: E402
from pocket.checkpoints import LONGEST_STEP, Clock, save_atomically  # noqa: E402
from pocket.damage import LADDERS  # noqa: E402
from pocket.optimisers import Muon  # noqa: E402
from pocket.scenes import (  # noqa: E402
    SHAPES,
    Placed,
    caption,
    close_up,
    draw,
    place,
    render,
    sample_scene,
)
from pocket.scores import SHOWN, Judge, ladders, unseen  # noqa: E402
from pocket.settings import Settings  # noqa: E402
from pocket.tokenizer import CLOSE_UP, build_tokenizer, words  # noqa: E402
from pocket.unet import (  # noqa: E402
    LAST_STRETCH,
    ShapeReader,
    batch_of,
    build_unet,
    rate_at,
    times_at,
)
from pocket.vae import build_vae, encode, latents_of  # noqa: E402
from pocket.variants import ATTRIBUTES, variants_of  # noqa: E402

pytestmark = pytest.mark.slow

SETTINGS = Settings(
    out=SCRIPTS.parent / "agentsd" / "pocket", work=Path("unused"), device=torch.device("cpu")
)


def scenes(count: int, seed: int = 0) -> list:
    """Scenes 0 to count - 1 of a seed's stream."""
    return [sample_scene(np.random.default_rng((seed, i))) for i in range(count)]


@pytest.mark.sample
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

    def test_a_close_up_is_a_part_of_the_whole(self):
        for scene in scenes(40):
            background, shapes = place(scene)
            part = draw(background, close_up(shapes, 0.25, 0.375, 0.5), 128)
            whole = draw(background, shapes, 256)
            assert np.abs(part.astype(int) - whole[96:224, 64:192]).max() <= 1

    def test_repeated_shapes_share_all_but_their_place(self):
        lines = [s for s in scenes(400) if s.layout in ("row", "column", "ring", "grid")]
        looks = []
        for scene in lines:
            first, *rest = (replace(shape, x=0.0, y=0.0) for shape in place(scene)[1])
            assert all(shape == first for shape in rest)
            looks.append(first)
        assert 0.2 < np.mean([shape.stripes is not None for shape in looks]) < 0.6
        assert len(set(looks)) == len(looks)

    def test_stripes_are_seen(self):
        striped = next(s for s in scenes(100) if place(s)[1][0].stripes)
        background, shapes = place(striped)
        plain = draw(background, [replace(s, stripes=None) for s in shapes], 64)
        assert np.abs(plain.astype(int) - render(striped, 64)).max() > 30

    def test_most_close_ups_show_a_shape_and_all_say_what_they_are(self):
        dataset = CloseUps(0, 32)
        pictures, captions = zip(*(dataset[i] for i in range(100)), strict=True)
        assert all(text.split()[0] == CLOSE_UP for text in captions)
        assert np.mean([picture.flatten(1).float().std(1).max() > 5 for picture in pictures]) > 0.9

    @pytest.mark.parametrize("kind", [CloseUps, ScenePictures])
    def test_maps_say_where_shapes_are(self, kind):
        dataset, marked, plain = kind(0, 128), [], []
        for i in range(50):
            background, shapes, text = dataset.view(np.random.default_rng((0, i)))
            picture, said, cells = dataset.with_map(i)
            assert said == text
            assert cells.shape == (8, 8)
            away = (picture / 255 - torch.tensor(background)[:, None, None]).abs().amax(0)
            assert (away[CELL // 2 :: CELL, CELL // 2 :: CELL][cells == 0] < 0.01).all()
            seen = F.max_pool2d(away[None], CELL)[0] > 0.1
            marked.append(seen[cells > 0])
            plain.append(seen[cells == 0])
            assert set(cells.unique().tolist()) <= {0, *(named(s) for s in shapes)}
        # Distances are to the lines of edges, which go on beyond the corners.
        assert torch.cat(marked).float().mean() > 0.9
        assert torch.cat(plain).float().mean() < 0.1

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


def named(shape: Placed) -> int:
    """What a map calls a shape."""
    return 1 + list(SHAPES).index(shape.shape)


class TestTokenizer:
    def test_thousands_of_captions_come_back_word_for_word(self, tmp_path):
        tokenizer = build_tokenizer(tmp_path)
        for text in {*SHOWN, *(caption(s) for s in scenes(4000))}:
            ids = tokenizer(text).input_ids
            assert len(ids) == len(text.split()) + 2 <= tokenizer.model_max_length
            assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text

    @pytest.mark.sample
    def test_close_up_is_one_token_more_and_the_last(self, tmp_path):
        tokenizer = build_tokenizer(tmp_path)
        last = len(tokenizer) - 1
        start, *rest = tokenizer(SHOWN[0]).input_ids
        assert tokenizer(f"{CLOSE_UP} {SHOWN[0]}").input_ids == [start, last, *rest]
        assert tokenizer(CLOSE_UP).input_ids == [start, last, rest[-1]]
        assert last not in rest

    @pytest.mark.sample
    def test_no_two_words_share_a_token(self, tmp_path):
        tokenizer = build_tokenizer(tmp_path)
        assert len({tokenizer(word).input_ids[1] for word in words()}) == len(words())

    @pytest.mark.sample
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
        pooled = F.avg_pool2d(latents_of(pictures), 2)
        torch.testing.assert_close(latents_of(smaller), pooled)


class TestMuon:
    @pytest.mark.parametrize("shape", [(8, 6), (8, 6, 3, 3)])
    def test_moves_the_weight_itself_by_an_orthogonal_step(self, shape):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(shape))
        before = weight.detach().clone()
        optimiser = Muon([weight], 0.1)
        weight.grad = torch.randn(shape)
        weight.grad[4:] *= 0.1
        optimiser.step()
        moved = (weight.detach() - before * (1 - 0.1 * 0.01)).flatten(1)
        stretches = torch.linalg.svdvals(moved)
        assert stretches.min() > 0.5 * stretches.max()  # those of the gradient are further apart
        plain = torch.linalg.svdvals(weight.grad.flatten(1))
        assert plain.min() < 0.5 * plain.max()


class TestShapeReader:
    def test_it_teaches_the_middle_and_the_captions(self, tmp_path):
        unet = build_unet(smoke=True)
        reader, context = ShapeReader(unet), torch.randn(2, 5, 128, requires_grad=True)
        maps = torch.tensor([[[0, 1], [2, 3]], [[4, 0], [0, 0]]]).repeat(1, 2, 2)
        unet(torch.randn(2, 4, 16, 16), torch.tensor([900, 500]), context)
        inside = [*unet.mid_block.parameters(), context]
        gradients = torch.autograd.grad(reader.loss(maps), inside, allow_unused=True)
        assert gradients[-1].abs().max() > 0
        assert any(g is not None and g.abs().max() > 0 for g in gradients[:-1])

    def test_what_it_reads_decides_the_loss(self):
        unet = build_unet(smoke=True)
        reader, maps = ShapeReader(unet), torch.tensor([[[0, 1], [2, 3]]])
        truth = F.one_hot(maps, 16).permute(0, 3, 1, 2).float()  # as many channels as the middle
        with torch.no_grad():
            reader.weight.copy_(10 * torch.eye(5, 16))
        reader.inside.features = truth
        assert reader.loss(maps) < 0.01
        assert reader.loss(maps.flip(1)) > 5


class TestScorer:
    """Of the model that comes with agentsd."""

    @pytest.fixture(scope="class")
    def judge(self) -> Judge:
        return Judge.exported(SETTINGS)

    def test_it_reads_every_word_of_the_tokenizer(self, judge):
        assert judge.clip.config.text_config.vocab_size == len(judge.processor.tokenizer)
        assert judge.texts([f"{CLOSE_UP} a red circle on a blue background"]).shape == (1, 96)

    def test_renders_beat_captions_that_differ_in_one_attribute(self, judge):
        found = unseen(SETTINGS, 200)
        images = [Image.fromarray(render(scene, 256)) for scene in found]
        right = judge.judge(found, images)["attributes"]
        assert right.keys() == set(ATTRIBUTES)
        assert all(figure["right"] > 0.85 for figure in right.values()), right
        wrong = judge.judge(found, images[1:] + images[:1])["attributes"]
        assert all(figure["right"] < 0.7 for figure in wrong.values()), wrong

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
    def test_whole_pictures_have_the_last_stretch_to_themselves(self):
        early, late = (batch_of(p, SETTINGS) for p in (LAST_STRETCH - 0.01, LAST_STRETCH))
        assert early["close-up"] > early["whole"] > 0
        assert late["close-up"] == 0 < late["whole"]

    def test_the_rate_rises_stays_and_falls_to_nothing(self):
        assert rate_at(0.0, 0) < rate_at(0.0, 50) < rate_at(0.0, 100) == 1
        assert rate_at(LAST_STRETCH, 1000) == 1 > rate_at(0.95, 1000) > rate_at(1.0, 1000) == 0

    def test_whole_pictures_see_more_noise_until_the_last_stretch(self):
        share = torch.linspace(0, 0.999, 500)
        near, whole, last = (
            times_at(share, *of).float() for of in (("close-up", 0), ("whole", 0), ("whole", 0.9))
        )
        assert torch.equal(near, last)
        assert (whole >= near).all()
        assert whole.mean() > near.mean() + 100
        for times in (near, whole):
            assert times.min() == 0
            assert times.max() > 990

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
        assert {"cosine", "shape"} <= names
        for kind in KINDS:
            with Image.open(smoke / "work" / f"{kind}.jpg") as picture:
                assert picture.getextrema() != ((0, 0),) * 3

    def test_it_names_no_folder_of_the_machine(self, smoke):
        for file in (smoke / "out").rglob("*.json"):
            assert str(smoke) not in file.read_text(), file

    def test_a_killed_run_goes_on_from_its_checkpoint(self, smoke, tmp_path):
        shutil.copytree(smoke / "work", tmp_path / "work")
        kept = tmp_path / "work" / "unet.pt"
        start = torch.load(kept, weights_only=True)["step"]
        unet = ("--stage", "unet", "--save-every", "0")
        endless = command(tmp_path, *unet, "--steps", "1000000")
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
        again = command(tmp_path, *unet, "--steps", str(last))
        done = subprocess.run(again, capture_output=True, text=True, timeout=100, check=False)
        assert f"unet: resumed at step {killed['step']}," in done.stderr
        final = torch.load(kept, weights_only=True)
        assert final["step"] == last
        assert final["spent"] > killed["spent"] > 0
        assert final["average"]["steps"] == killed["average"]["steps"] + 2
        assert final["seen"] > killed["seen"]
        adam = next(iter(final["optimisers"][1]["state"].values()))
        assert int(adam["step"]) == last
