"""The plan past one machine; test_distributed.py holds it to what processes hold and send."""

import json

import pytest

from benchmarks.plan_parallel import Layer, Setting, cost, llama_block, main, plans, report, total

SETTING = Setting(r=16, M=1024)
COLUMN, ROW = Layer("up", 4096, 16384, "column"), Layer("down", 16384, 4096, "row")
ADAPTER = 16 * (4096 + 16384) * 4
WEIGHT = 4096 * 16384 * 2


def test_ddp_sends_the_adapters_gradients_twice_over():
    one = cost(COLUMN, 64, 1, "ddp", SETTING)
    assert one.base == WEIGHT
    assert one.messages == {"all_reduce/64": ADAPTER}
    assert one.sent == round(2 * 63 / 64 * ADAPTER)
    assert one.optimizer == 2 * one.adapter == 2 * ADAPTER


def test_fsdp_splits_everything_and_pads_A():
    even = cost(COLUMN, 16, 1, "fsdp", SETTING)
    assert even.base + even.adapter == (WEIGHT + ADAPTER) / 16
    assert even.messages["all_gather/16"] == 2 * (WEIGHT + ADAPTER)
    many = cost(COLUMN, 1024, 1, "fsdp", SETTING)  # 16 rows of A on 1024 ranks
    padding = (1024 - 16) * 4096 * 4
    assert many.messages["reduce_scatter/1024"] == ADAPTER + padding
    columns = cost(COLUMN, 1024, 1, "fsdp_columns", SETTING)
    assert columns.messages["reduce_scatter/1024"] == ADAPTER


@pytest.mark.parametrize("layer", [COLUMN, ROW])
def test_tensor_parallel_splits_the_weight(layer):
    one = cost(layer, 8, 8, "ddp", SETTING)
    assert one.base == WEIGHT / 8
    activations = 1024 * 4096 * 2
    whole_factor = 16 * 4096 * 4
    assert one.messages["all_reduce/8"] == activations + whole_factor
    assert one.saved == 1024 * ((4096 if layer is COLUMN else 16384 // 8) + 16) * 2


def test_one_gpu_sends_nothing():
    for data in ("ddp", "fsdp"):
        assert cost(COLUMN, 1, 1, data, SETTING).sent == 0


def test_layers_that_share_x_save_it_once():
    block = total([cost(layer, 8, 1, "ddp", SETTING) for layer in llama_block()])
    rows = 4096 + 4096 + 4096 + 14336  # of q, k, v; o; gate, up; down
    assert block.saved == 1024 * (rows + 7 * 16) * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((COLUMN, 12, 8, "ddp", SETTING), "gpus: got 12, wanted a multiple of tp = 8"),
        ((Layer("odd", 64, 100, "column"), 8, 8, "ddp", SETTING), "odd: 100 does not divide"),
        ((Layer("odd", 100, 64, "column"), 8, 1, "fsdp_columns", SETTING), "A's 100 columns"),
    ],
)
def test_sizes_that_do_not_divide(arguments, message):
    with pytest.raises(ValueError, match=message):
        cost(*arguments)


def test_report(tmp_path, monkeypatch, capsys):
    file = tmp_path / "plan.json"
    monkeypatch.setattr("sys.argv", ["plan_parallel", "--gpus", "8,1024", "--json", str(file)])
    main()
    rows = json.loads(file.read_text())
    assert rows == json.loads(json.dumps(report(llama_block(), [8, 1024], Setting())))
    assert len(rows) == len(plans(8)) + len(plans(1024))
    assert "TP 8 x DDP 128" in capsys.readouterr().out
