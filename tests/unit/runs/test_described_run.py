"""What a run records of itself at every start."""

from support.tiny_run import some_fingerprint

from dora_dist.config.parse import load_config, parse_config
from dora_dist.runs import records


def test_who_reads_while_a_run_starts_again_sees_the_former_settings_whole(tmp_path):
    run = records.RunRecords(tmp_path, writes=True)
    configs = [
        parse_config(["--output_dir", "x", "--model.path", "m", "--data.train", "a.json", "--seed", str(seed)])
        for seed in (1, 2)
    ]
    run.describe_run(configs[0], some_fingerprint(), {}, 1)
    path = tmp_path / records.CONFIG
    former = path.read_text()
    with path.open() as reader:
        run.describe_run(configs[1], some_fingerprint(), {}, 1)
        assert reader.read() == former
    assert load_config(path) == configs[1]
    assert sorted(file.name for file in tmp_path.iterdir()) == [records.CONFIG, records.RUN]
