"""Shards that are read from beginning to end: by URL, shuffled, divided among readers, and taken up in mid-epoch."""

import functools
import http.server
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from shard_cases import colours, data_of, image_folder, jpeg, packed, png, shards_of, write_tar
from test_data_batches import Recorder, SaveAndStop, Stop, run
from webdataset import WebDataset

from diffusion.data.shard_stream import raw_samples

FEW = {"reading": "stream", "shuffle_buffer": 7, "batch_size": 4, "samples_per_epoch": 40}


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A folder and its address on a web server of this machine."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield tmp_path, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def epoch(data, **position) -> list[list[int]]:
    loader = data.train_dataloader()
    if position:
        loader.start(**position)
    return [colours(batch) for batch in loader]


def rank_of(data, rank: int, world_size: int = 2):
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size, overfit_batches=0.0)
    return data


# -- what is read ------------------------------------------------------------------------------------------------------


def test_shards_are_streamed_by_url_with_labels_and_captions(served):
    folder, url = served
    shards_of(folder, 60)
    data = data_of(f"{url}/{{000..005}}.tar", num_classes=3, captions=True, batch_size=4, samples_per_epoch=40)
    assert not data.indexed
    seen = []
    for batch in data.train_dataloader():
        shown = colours(batch)
        assert batch["label"].tolist() == [number % 3 for number in shown]
        assert batch["caption"] == [f"picture {number}" for number in shown]
        seen += shown
    held = [number for batch in data.val_dataloader() for number in colours(batch)]
    assert len(set(seen)) == len(seen) == 40 and len(held) == 10 and not set(seen) & set(held)


def test_a_manifest_beside_the_shards_says_how_many_and_which_classes(served):
    folder, url = served
    packed(image_folder(folder / "images", a_class=20), folder / "out", shard_size=8)
    data = data_of(f"{url}/out/{{000000..000004}}.tar", num_classes=2, batch_size=4, val_fraction=0.2)
    loader = data.train_dataloader()
    assert data.class_names == ("cat", "dog") and len(loader) == 8
    indices = [index for batch in loader for index in batch["index"].tolist()]
    assert len(set(indices)) == 32 and max(indices) < 32


def test_a_pipe_is_streamed(tmp_path):
    shards_of(tmp_path, 20)
    data = data_of(f"pipe:cat {tmp_path}/{{000..001}}.tar", **FEW | {"samples_per_epoch": 8})
    assert len({number for batch in epoch(data) for number in batch}) == 8


def test_the_stream_holds_what_webdataset_reads(tmp_path):
    paths = [str(path) for path in shards_of(tmp_path, 23)]
    theirs = [(sample["__key__"], sample["png"]) for sample in WebDataset(paths, shardshuffle=False)]
    ours = list(raw_samples(paths))
    assert [(sample.key, sample.fields["png"]) for sample in ours] == theirs
    assert [(sample.url, sample.number) for sample in ours][9:12] == [(paths[0], 9), (paths[1], 0), (paths[1], 1)]


def test_order_is_a_function_of_seed_and_epoch_and_mixes_shards(tmp_path):
    shards_of(tmp_path, 60)
    loader = data_of(tmp_path, **FEW).train_dataloader()
    first, second = ([colours(batch) for batch in loader] for _ in range(2))
    assert first != second
    assert epoch(data_of(tmp_path, **FEW), epoch=1) == second
    assert epoch(data_of(tmp_path, **FEW, seed=1)) != first
    shards = [[number // 10 for number in batch] for batch in first]
    assert any(len(set(batch)) > 1 for batch in shards)  # the buffer reaches over a shard's end
    assert [shard for batch in shards for shard in batch] != sorted(shard for batch in shards for shard in batch)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_no_sample_is_seen_twice_in_an_epoch_on_all_ranks_and_workers(tmp_path, num_workers):
    packed(image_folder(tmp_path / "images", a_class=45), tmp_path / "out", shard_size=11)  # the last shard has two
    settings = FEW | {"samples_per_epoch": None, "batch_size": 3, "num_workers": num_workers, "val_fraction": 0.1}
    for number in range(2):
        seen, counts = [], set()
        for rank in range(2):
            loader = rank_of(data_of(tmp_path / "out", **settings), rank).train_dataloader()
            loader.start(number)
            batches = [batch["index"].tolist() for batch in loader]
            counts.add((len(batches), len(loader)))
            seen += [index for batch in batches for index in batch]
        assert len(counts) == 1 and len(seen) == len(set(seen)) >= 30


def test_an_epoch_longer_than_the_shards_begins_them_again_and_says_so(tmp_path):
    shards_of(tmp_path, 20)
    data = data_of(tmp_path, **FEW | {"samples_per_epoch": 20})
    with pytest.warns(UserWarning, match=r"samples_per_epoch=20 is more than the shards of one worker hold"):
        seen = [number for batch in epoch(data) for number in batch]
    assert len(seen) == 20 and len(set(seen)) == 10


# -- where it goes on --------------------------------------------------------------------------------------------------


def with_broken(folder: Path) -> Path:
    """Shards in which some samples are broken, differently many in each."""
    for shard in range(6):
        write_tar(
            folder / f"{shard}.tar",
            {
                f"{shard}-{n}": {"jpg": jpeg(10 * shard + n)[: 700 if n % 5 == shard % 3 else None]}
                for n in range(8 + shard)
            },
        )
    return folder


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 3, 6])
@pytest.mark.filterwarnings("ignore:broken and left out")
def test_a_position_is_exact_with_broken_samples_too(tmp_path, num_workers, stop):
    settings = FEW | {"num_workers": num_workers, "image_size": 8, "samples_per_epoch": 28, "horizontal_flip": True}
    with_broken(tmp_path)
    whole = [batch["image"] for batch in data_of(tmp_path, **settings).train_dataloader()]
    data = data_of(tmp_path, **settings)
    batches = iter(data.train_dataloader())
    for _ in range(stop):
        next(batches)
    state = data.state_dict()
    assert state["samples"] == 4 * stop and sum(state["taken"][0]) > 4 * stop
    again = data_of(tmp_path, **settings)
    again.load_state_dict(state)
    rest = [batch["image"] for batch in again.train_dataloader()]
    assert len(whole) == 7 and all(torch.equal(*pair) for pair in zip(rest, whole[stop:], strict=True))


def trained(folder, *, num_workers: int, **how):
    data = data_of(folder, **FEW | {"num_workers": num_workers})
    return run(data=data, max_epochs=3, accumulate_grad_batches=2, **how)


@pytest.mark.parametrize(("num_workers", "count"), [(0, 3), (0, 10), (0, 14), (2, 13)])
def test_a_resumed_run_sees_what_an_unbroken_run_sees(tmp_path, num_workers, count):
    shards_of(tmp_path / "shards", 60)
    whole = trained(tmp_path / "shards", num_workers=num_workers)
    stop, broken = SaveAndStop(tmp_path / "last.ckpt", hook="on_train_batch_end", count=count, further=1), Recorder()
    with pytest.raises(Stop):
        trained(tmp_path / "shards", num_workers=num_workers, module=broken, callbacks=[stop])
    resumed = trained(tmp_path / "shards", num_workers=num_workers, ckpt_path=tmp_path / "last.ckpt")
    assert broken.steps[: stop.saved_steps] + resumed.steps == whole.steps and len(whole.steps) == 15
    assert torch.equal(resumed.weight, whole.weight)


def test_other_readers_go_on_after_as_many_samples_and_say_so(tmp_path):
    shards_of(tmp_path, 60)
    data = data_of(tmp_path, **FEW)
    batches = iter(data.train_dataloader())
    for _ in range(4):
        next(batches)
    again = data_of(tmp_path, **FEW, num_workers=2)
    again.load_state_dict(data.state_dict())
    with pytest.warns(
        UserWarning, match=r"the checkpoint is of 1 ranks x 1 workers that read shards, and here are 1 x 2"
    ):
        loader = again.train_dataloader()
    assert len(list(loader)) == 10 - 4
    assert again.state_dict()["samples"] == 40


# -- what is broken ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 1])
def test_broken_samples_are_left_out_named_and_counted(tmp_path, num_workers):
    with_broken(tmp_path)
    data = data_of(tmp_path, **FEW | {"num_workers": num_workers, "samples_per_epoch": 32})
    with pytest.warns(UserWarning, match=r"broken and left out: .*\.tar: \d-\d \(.*truncated"):
        batches = list(data.train_dataloader())
    assert all(batch["image"].shape == (4, 3, 6, 6) and set(batch) == {"image", "index"} for batch in batches)
    assert len(data.broken) >= 5


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.filterwarnings("ignore:broken and left out")
def test_too_many_broken_samples_end_the_run_with_one_error(tmp_path, num_workers):
    with_broken(tmp_path)
    data = data_of(tmp_path, **FEW | {"num_workers": num_workers, "max_broken": 3})
    with pytest.raises(ValueError, match=r"^\d samples cannot be used, and data\.max_broken=3: "):
        list(data.train_dataloader())


def test_shards_without_one_usable_sample_do_not_run_for_ever(tmp_path):
    for shard in range(3):
        write_tar(tmp_path / f"{shard}.tar", {f"{n}": {"txt": b"no picture"} for n in range(9)})
    with pytest.raises(ValueError, match=r"no sample of .* can be used to validate: .*it has no image, but \.txt"):
        data_of(tmp_path, **FEW).setup()
    write_tar(tmp_path / "3.tar", {"0": {"png": png(0)}})
    data = data_of([f"{tmp_path}/{{0..2}}.tar"], **FEW, val_shards=f"{tmp_path}/3.tar", max_broken=10)
    with pytest.raises(ValueError, match=r"1\d samples cannot be used, and data\.max_broken=10"):
        list(data.train_dataloader())


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_shard_is_named(tmp_path, num_workers):
    paths = shards_of(tmp_path, 40)
    data = data_of(tmp_path, **FEW | {"num_workers": num_workers}, val_shards=str(paths[3]))
    os.truncate(paths[1], 4000)
    with pytest.raises(ValueError, match=r"^the shard .*001\.tar is cut short or no tar file.*; copy or pack it again"):
        list(data.train_dataloader())


def test_a_url_that_is_not_there_is_named(served):
    folder, url = served
    shards_of(folder, 20)
    data = data_of([f"{url}/000.tar", f"{url}/009.tar"], **FEW, val_shards=f"{url}/001.tar")
    with pytest.raises(ValueError, match=r"the shard http://127\.0\.0\.1:\d+/009\.tar is cut short or no tar file"):
        list(data.train_dataloader())


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_workers", "world_size", "message"),
    [
        (4, 1, r"3 training shards cannot be shared by 1 ranks x 4 workers: .*; set data\.num_workers=3, or pack sm"),
        (2, 2, r"3 training shards cannot be shared by 2 ranks x 2 workers: .*; set data\.num_workers=1, or"),
        (0, 4, r"3 training shards cannot be shared by 4 ranks x 1 workers: .*; use fewer ranks, or"),
    ],
)
def test_more_readers_than_shards_are_refused(tmp_path, num_workers, world_size, message):
    shards_of(tmp_path, 40)
    data = rank_of(data_of(tmp_path, **FEW, num_workers=num_workers), 0, world_size)
    with pytest.raises(ValueError, match=message):
        data.train_dataloader()


def test_a_stream_must_say_how_long_it_is(tmp_path):
    shards_of(tmp_path, 20)
    with pytest.raises(ValueError, match=r"how many samples they hold; set data\.samples_per_epoch=N, or pack them"):
        data_of(tmp_path, reading="stream").setup()
    with pytest.raises(ValueError, match=r"is the only shard, and a stream sets whole shards aside"):
        data_of(tmp_path / "000.tar", **FEW).setup()
    with pytest.raises(ValueError, match=r"training images do not fill one batch"):
        data_of(tmp_path, **FEW | {"samples_per_epoch": 3}).train_dataloader()
