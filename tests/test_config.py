import pytest

from gisp_hf.config import GISPConfig, level_name, protected_layers
from gisp_hf.pruning.schedule import target_sparsity, targets_of_step


def test_defaults_are_the_documented_ones() -> None:
    config = GISPConfig()
    assert config.sparsity_levels == (0.2, 0.3, 0.4, 0.5)
    assert (config.num_steps, config.schedule, config.normalization, config.prune) == (80, "linear", "params", "both")
    assert (config.protect_first, config.protect_last) == (0.1, 1)
    assert (config.minimum_kept, config.channel_multiple, config.method) == ({}, 1, "gisp")
    assert config.score_momentum == 0
    assert config.minimum_of("attention") == config.minimum_of("mlp") == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sparsity_levels": (1.2,)}, r"must lie in \(0, 1\), got 1.2"),
        ({"sparsity_levels": (0.0, 0.5)}, r"must lie in \(0, 1\), got 0"),
        ({"sparsity_levels": (0.5, 0.3)}, "must increase"),
        ({"sparsity_levels": (0.3, 0.3)}, "must increase"),
        ({"sparsity_levels": (0.30001, 0.30002)}, "share a folder name"),
        ({"sparsity_levels": ()}, "is empty"),
        ({"num_steps": 0}, "num_steps must be a whole number of at least 1, got 0"),
        ({"num_steps": 2.5}, "num_steps"),
        ({"schedule": "quadratic"}, "schedule must be one of linear, cosine, exponential, got 'quadratic'"),
        ({"normalization": "l2"}, "normalization must be one of params, root, reference, standardized, none"),
        ({"score_momentum": 1.0}, r"score_momentum must be a number in \[0, 1\), got 1.0"),
        ({"score_momentum": True}, "score_momentum must be a number"),
        ({"prune": "layers"}, "prune must be one of both, heads, channels"),
        ({"protect_first": -1}, "protect_first"),
        ({"protect_last": 1.5}, "protect_last"),
        (
            {"minimum_kept": {"attention": 0}},
            r"minimum_kept\['attention'\] must be a whole number .* got 0",
        ),
        ({"minimum_kept": 2}, "minimum_kept must map kinds to counts"),
        ({"channel_multiple": 0}, "channel_multiple"),
    ],
)
def test_bad_values_are_named(values, message) -> None:
    with pytest.raises(ValueError, match=message):
        GISPConfig(**values)


def test_round_trip_through_dict_and_yaml(tmp_path) -> None:
    config = GISPConfig(sparsity_levels=(0.125, 0.6), num_steps=7, schedule="cosine", protect_first=2, prune="heads")
    assert GISPConfig.from_dict(config.to_dict()) == config
    config.to_yaml(tmp_path / "config.yaml")
    assert GISPConfig.from_yaml(tmp_path / "config.yaml") == config


def test_unknown_keys_raise(tmp_path) -> None:
    with pytest.raises(TypeError, match="unknown keys sparsity; GISPConfig has sparsity_levels"):
        GISPConfig.from_dict({"sparsity": 0.5})
    (tmp_path / "list.yaml").write_text("- 0.5\n")
    with pytest.raises(ValueError, match="must hold a mapping"):
        GISPConfig.from_yaml(tmp_path / "list.yaml")


@pytest.mark.parametrize(
    ("level", "name"),
    [(0.2, "sparsity-0.20"), (0.375, "sparsity-0.375"), (0.05, "sparsity-0.05"), (0.0125, "sparsity-0.0125")],
)
def test_level_names(level, name) -> None:
    assert level_name(level) == name


def test_protected_layers() -> None:
    assert protected_layers(30, first=0.1, last=1) == {0, 1, 2, 29}
    assert protected_layers(32, first=0.1, last=1) == {0, 1, 2, 31}  # int(0.1 * 32) = 3, as in the paper
    assert protected_layers(8, first=2, last=0.25) == {0, 1, 6, 7}
    assert protected_layers(4, first=0, last=0) == set()


@pytest.mark.parametrize("schedule", ["linear", "cosine", "exponential"])
def test_schedules_grow_to_the_final_sparsity(schedule) -> None:
    targets = [target_sparsity(step, 10, final=0.7, schedule=schedule) for step in range(1, 11)]
    assert targets == sorted(targets) and targets[0] > 0 and targets[-1] == 0.7


def test_schedules_by_hand() -> None:
    assert target_sparsity(1, 4, final=0.4, schedule="linear") == pytest.approx(0.1)
    assert target_sparsity(2, 4, final=0.4, schedule="cosine") == pytest.approx(0.2)
    assert target_sparsity(1, 2, final=0.75, schedule="exponential") == pytest.approx(0.5)  # halves twice
    with pytest.raises(ValueError, match="schedule must be one of"):
        target_sparsity(1, 2, final=0.5, schedule="steep")  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "exponential"])
@pytest.mark.parametrize("num_steps", [1, 3, 20, 80])
def test_every_level_is_met_once_in_order(schedule, num_steps) -> None:
    levels = (0.1 + 0.2, 0.4, 0.55)  # 0.30000000000000004
    stops = [
        stop
        for step in range(1, num_steps + 1)
        for stop in targets_of_step(step, num_steps, levels=levels, schedule=schedule)
    ]
    assert [level for _, level in stops if level is not None] == list(levels)
    targets = [target for target, _ in stops]
    assert targets == sorted(targets)
    assert all(target == level for target, level in stops if level is not None)
