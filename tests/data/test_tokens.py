"""Token datasets: the same windows in the same order as the pixels they were made from, and no other use of them."""

import json
import pickle

import numpy as np
import pytest

from jasmine.data import inspect, verify
from jasmine.data.opening import open_dataset
from jasmine.data.pipeline import batches, is_labelled, record_ids
from jasmine.data.sampling import WindowSampler
from jasmine.data.tokens import TokenDataset, open_training_data
from jasmine.errors import UserError
from tests.data.test_pipeline import assert_equal, take
from tests.data.token_windows import LENGTHS, SEQ_LEN, encoder, tokens_of, write_source, write_tokens


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def pixels(source):
    return open_training_data(source)


@pytest.fixture(scope="module")
def tokens(source, tmp_path_factory):
    return open_training_data(write_tokens(source, tmp_path_factory.mktemp("tokens") / "out"))


def test_every_step_has_the_examples_that_it_would_have_from_pixels(pixels, tokens):
    assert isinstance(tokens, TokenDataset)
    assert (
        WindowSampler(tokens.lengths, SEQ_LEN, 0).num_windows == WindowSampler(pixels.lengths, SEQ_LEN, 0).num_windows
    )
    for step, (left, right) in enumerate(zip(take(pixels, 30), take(tokens, 30), strict=True)):
        assert right.keys() == {"tokens", "actions"}
        assert (right["tokens"].dtype, right["actions"].dtype) == (np.int32, np.int32)
        np.testing.assert_array_equal(right["tokens"], tokens_of(left["videos"]), f"step {step}")
        np.testing.assert_array_equal(right["actions"], left["actions"])


def test_rows_threads_and_first_step_change_nothing(tokens):
    expected = take(tokens, 20, num_threads=0)
    assert_equal(take(tokens, 10, start_step=10, num_threads=3), expected[10:])
    rows = np.array([1, 4, 5])
    assert_equal(take(tokens, 20, rows=rows), [{key: value[rows] for key, value in b.items()} for b in expected])


@pytest.mark.slow
def test_workers_change_nothing(tokens):
    assert_equal(take(tokens, 20, num_workers=2), take(tokens, 20))


@pytest.mark.parametrize("kind", ["tokens", "latents"])
@pytest.mark.parametrize("lam", [False, True])
@pytest.mark.parametrize("actions", [False, True])
def test_what_a_batch_holds(tmp_path, kind, lam, actions):
    source = write_source(tmp_path / "source", actions=actions)
    target = write_tokens(source, tmp_path / "out", encoder(kind, lam=lam))
    [left], [right] = take(open_training_data(source), 1), take(open_training_data(target), 1)
    expected = tokens_of(left["videos"])
    if kind == "tokens":
        np.testing.assert_array_equal(right.pop("tokens"), expected)
    else:
        assert right["latents"].dtype == np.float32
        np.testing.assert_array_equal(right.pop("latents"), np.stack([expected, -expected], -1).astype(np.float32) / 7)
    if lam:
        latent_actions = right.pop("latent_actions")
        assert latent_actions.dtype == np.int32
        np.testing.assert_array_equal(latent_actions[:, :-1], left["videos"][:, 1:, 0, 0, 1] % 6)
        assert not latent_actions[:, -1].any()
    if actions:
        np.testing.assert_array_equal(right.pop("actions"), left["actions"])
    assert not right


def test_stride_keeps_every_nth_window(source, tmp_path):
    dataset = open_training_data(write_tokens(source, tmp_path / "out", stride=SEQ_LEN))
    found = set()
    for batch in take(dataset, 20):
        found |= {(int(row[0, 0]), int(row[0, 1]) - 300) for row in batch["tokens"]}
    assert found == {(e, t) for e, n in enumerate(LENGTHS) for t in range(0, n - SEQ_LEN + 1, SEQ_LEN)}
    assert dataset.num_frames == sum(n - n % SEQ_LEN for n in LENGTHS)


def test_what_a_trainer_needs_to_know(pixels, tokens):
    assert tokens.frame_shape == pixels.frame_shape == (8, 8, 3)
    assert (tokens.num_actions, tokens.action_shape, tokens.fps) == (10_000, (), 1.0)
    assert (tokens.tokens.seq_len, tokens.tokens.shape, tokens.tokens.tokenizer.fingerprint) == (SEQ_LEN, (3,), "f00d")
    assert tokens.num_frames == sum(n for n in LENGTHS if n >= SEQ_LEN)
    assert_equal(take(pickle.loads(pickle.dumps(tokens)), 3), take(tokens, 3))


def test_record_ids_name_the_windows_of_the_source(pixels, tokens):
    asked = {"seq_len": SEQ_LEN, "batch_size": 8, "seed": 5, "step": 3}
    for left, right in zip(record_ids(pixels, **asked), record_ids(tokens, **asked), strict=True):
        assert (left.episode, left.start) == (right.episode, right.start)


def test_labels_are_those_of_the_source_episodes(pixels, tokens):
    left, right = (take(dataset, 30, label_fraction=0.5) for dataset in (pixels, tokens))
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a["labelled"], b["labelled"])
    assert tokens.episode_ids.tolist() == [0, 2, 3, 4, 6]
    answers = is_labelled(pixels, np.arange(len(LENGTHS)), seed=5, fraction=0.5)
    for batch in right:
        np.testing.assert_array_equal(batch["labelled"], answers[batch["tokens"][:, 0, 0]])


def test_another_window_length_is_refused(tokens):
    expected = rf"--seq_len=3: {tokens.path} holds the tokens of windows of 4 frames; train with --seq_len=4"
    with pytest.raises(UserError, match=expected):
        batches(tokens, seq_len=3, batch_size=8, seed=0)
    with pytest.raises(UserError, match=expected):
        tokens.read_windows(np.array([0]), np.array([0]), 3)


def test_tools_for_datasets_work_on_tokens(source, tmp_path, capsys):
    target = write_tokens(source, tmp_path / "out", encoder("latents", lam=True))
    assert verify.main([str(target)]) == 0
    assert inspect.main([str(target), "--out", str(tmp_path / "pictures")]) == 0
    assert "train: 5 episodes" in capsys.readouterr().out
    shard = next((target / "train").glob("*.array_record"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert verify.main([str(target)]) == 1
    with pytest.raises(UserError, match=shard.name):
        open_training_data(target)


def test_frames_are_opened_as_frames(pixels):
    assert type(pixels) is type(open_dataset(pixels.path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found["tokens"].pop("seq_len"), r"metadata.tokens.seq_len: Field required"),
        (lambda found: found["tokens"].update(kind="sounds"), r"metadata.tokens.kind: Input should be"),
        (
            lambda found: found["tokens"].update(seq_len=5),
            r"windows of \(4, 6, 1\), where metadata.tokens says \(5, 6, 1\)",
        ),
    ],
)
def test_an_index_that_is_not_understood(source, tmp_path, change, message):
    target = write_tokens(source, tmp_path / "out")
    path = target / "train" / "index.json"
    index = json.loads(path.read_text())
    change(index["metadata"])
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match=f"{path}.*{message}"):
        open_training_data(target)
