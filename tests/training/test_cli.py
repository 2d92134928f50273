import shlex

import pytest

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


def test_wrong_type_exits_with_2(capsys):
    with pytest.raises(SystemExit) as leaving:
        parse(TrainConfig, ["--num_steps", "many"])
    assert leaving.value.code == 2
    assert "num_steps" in capsys.readouterr().err


def test_contract_options_exist():
    contract = shlex.split(
        "data_dir ckpt_dir num_steps batch_size seq_len seed log_interval val_data_dir val_interval log_checkpoint_interval "
        "max_lr warmup_steps wsd_decay_steps dtype mesh.data mesh.fsdp mesh.tensor remat log log_batch_checksum stop_at_step"
    )
    assert set(contract) <= set(option_names(TrainConfig))
