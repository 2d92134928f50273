import dataclasses

import pytest

from jasmine.errors import UserError
from jasmine.training.config import TrainConfig
from jasmine.training.optimizer import learning_rate

BASE = TrainConfig(data_dir="d", num_steps=100, max_lr=1.0, decay_end=0.1, warmup_steps=10, wsd_decay_steps=20)


def test_wsd_warms_up_stays_and_decays():
    rate = learning_rate(BASE)
    assert [round(float(rate(step)), 3) for step in (0, 5, 10, 50, 80, 90, 100)] == [0, 0.5, 1, 1, 1, 0.55, 0.1]


def test_cosine_ends_where_asked():
    rate = learning_rate(dataclasses.replace(BASE, lr_schedule="cos"))
    assert float(rate(10)) == pytest.approx(1.0)
    assert float(rate(55)) == pytest.approx(0.55)
    assert float(rate(100)) == pytest.approx(0.1)


def test_defaults_follow_the_length_of_the_run():
    published = TrainConfig(data_dir="d")
    assert (published.resolved_warmup(), published.resolved_decay()) == (10_000, 30_000)
    short = TrainConfig(data_dir="d", num_steps=40)
    short.check()
    assert float(learning_rate(short)(1)) > 0


def test_schedule_longer_than_the_run_is_refused():
    with pytest.raises(UserError, match=r"--warmup_steps=90 and --wsd_decay_steps=20 together are longer"):
        dataclasses.replace(BASE, warmup_steps=90).check()
