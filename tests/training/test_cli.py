import math
import shlex

import pytest

from jasmine.baselines import train_lam
from jasmine.errors import UserError
from jasmine.training.cli import option_names, parse
from jasmine.training.config import TrainConfig


def test_options_by_both_spellings():
    config = parse(
        TrainConfig, ["--data_dir", "a", "--num-steps=7", "--mesh.fsdp", "2", "--log", "--warmup_steps", "3"]
    )
    assert (config.data_dir, config.num_steps, config.mesh.fsdp, config.log) == ("a", 7, 2, True)
    assert config.warmup_steps == 3


def test_misspelt_option_names_the_nearest():
    with pytest.raises(UserError, match=r"unknown option --batchsize; did you mean --batch_size\?"):
        parse(TrainConfig, ["--batchsize", "3"])
    with pytest.raises(UserError, match="unexpected argument 'fast'"):
        parse(TrainConfig, ["fast"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--num_steps many", "--num_steps=many: expected a whole number"),
        ("--num-steps=1e5", "--num_steps=1e5: expected a whole number"),
        ("--seed 1 --max_lr 1e-4,3e-4 --log", "--max_lr=1e-4,3e-4: expected a number"),
        ("--warmup_steps x", "--warmup_steps=x: expected a whole number"),
        ("--mesh.fsdp all", "--mesh.fsdp=all: expected a whole number"),
        ("--dtype float16", "--dtype=float16: expected one of bfloat16, float32"),
        ("--batch_size", "--batch_size: its value is missing; expected a whole number"),
        ("--data_dir --log", "--data_dir: its value is missing; expected a text"),
    ],
)
def test_a_value_of_another_type_is_one_line(arguments, says, capsys):
    with pytest.raises(UserError) as refusal:
        parse(TrainConfig, arguments.split())
    assert str(refusal.value) == says
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_workers": -1}, "--num_workers=-1: must be at least 0"),
        ({"max_lr": -1.0}, "--max_lr=-1.0: must be at least 0"),
        ({"max_lr": math.nan}, "--max_lr=nan: must be at least 0"),
        ({"weight_decay": math.inf}, "--weight_decay=inf: must be at least 0"),
        ({"seed": -1}, "--seed=-1: must be at least 0"),
        ({"warmup_steps": -5}, "--warmup_steps=-5: must be at least 0"),
        ({"adam_b2": 1.0}, "--adam_b2=1.0: from 0 up to, not including, 1"),
        ({"ema_decay": -0.1}, "--ema_decay=-0.1: from 0 up to, not including, 1"),
        ({"image_height": 0, "image_width": 4, "image_channels": 3}, "--image_height=0: must be at least 1"),
        ({"num_registers": -1}, "--num_registers=-1: must be at least 0"),
        ({"latent_dim": 0}, "--latent_dim=0: must be at least 1"),
        ({"vq_beta": -1.0}, "--vq_beta=-1.0: must be at least 0"),
        ({"codebook_dropout": 1.0}, "--codebook_dropout=1.0: from 0 up to, not including, 1"),
    ],
)
def test_numbers_out_of_range(options, says):
    train_lam.Config(data_dir="data").check()
    with pytest.raises(UserError) as refusal:
        train_lam.Config(data_dir="data", **options).check()
    assert str(refusal.value) == says


def test_contract_options_exist():
    contract = shlex.split(
        "data_dir ckpt_dir num_steps batch_size seq_len seed log_interval val_data_dir val_interval log_checkpoint_interval "
        "max_lr warmup_steps wsd_decay_steps dtype mesh.data mesh.fsdp mesh.tensor remat log log_batch_checksum stop_at_step"
    )
    assert set(contract) <= set(option_names(TrainConfig))
