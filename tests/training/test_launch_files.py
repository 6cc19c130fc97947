"""The files of launchers: each key is one that its engine reads, and means what the header promises."""

import functools
import os
import re
import signal
import stat
import subprocess
import time
from types import SimpleNamespace

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin, patch_environment
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from tiny import build
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers.distributed import DistributedConfig

from hf_vlm.models.modeling_vlm_vit import VLMViTModel
from hf_vlm.registry import find_model
from hf_vlm.training.layout import check_divisible, check_layout, divide
from hf_vlm.training.layout_arguments import LayoutArguments
from hf_vlm.training.recipe import shipped_folder

FILES = sorted((shipped_folder("recipes") / "accelerate").glob("*.yaml"))
NESTED = ("deepspeed_config", "dynamo_config", "fsdp_config", "parallelism_config")
SLURM = shipped_folder("recipes") / "launch" / "slurm.sh"
SKYPILOT = shipped_folder("recipes") / "launch" / "skypilot.yaml"


def launched(words, environment=None):
    """The launcher's arguments, and the environment that it would give its processes."""
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    with patch_environment(**(environment or {})):
        if args.use_deepspeed:
            args.deepspeed_fields_from_accelerate_config = ",".join(
                load_config_from_file(args.config_file).deepspeed_config
            )
            _, found = prepare_deepspeed_cmd_env(args)
        elif args.multi_gpu or args.use_fsdp:
            found = prepare_multi_gpu_env(args)
        else:
            _, found = prepare_simple_launcher_cmd_env(args)
    return args, {key: value for key, value in found.items() if os.environ.get(key) != value}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_key_is_one_of_the_launchers_and_the_header_has_its_command(path):
    known = {action.dest for action in launch_command_parser()._actions}
    config = load_config_from_file(str(path))  # rejects unknown keys of the first level
    for nested in NESTED:
        assert set(getattr(config, nested, None) or {}) <= known, nested
    command = re.search(r"^# accelerate launch (.*)$", path.read_text(), re.MULTILINE)[1].split()
    assert command[command.index("--config_file") + 1] == f"recipes/accelerate/{path.name}"
    words = ["--config_file", str(path), *command[2:]]
    args, environment = launched(words)
    assert args.training_script == "hf_vlm.cli"
    assert environment["ACCELERATE_MIXED_PRECISION"] == ("no" if path.stem == "cpu" else "bf16")


def engine(name):
    """Processes and environment of a file's launch."""
    path = str(shipped_folder("recipes") / "accelerate" / f"{name}.yaml")
    return launched(["--config_file", path, "-m", "hf_vlm.cli"])


@pytest.mark.parametrize(
    ("name", "sizes", "offloads"), [("fsdp2", None, False), ("fsdp2_offload", None, True), ("hsdp", (2, 8), False)]
)
def test_sharding_reaches_the_plugin_of_fsdp(name, sizes, offloads):
    args, environment = engine(name)
    with patch_environment(**environment):
        plugin = FullyShardedDataParallelPlugin()
        layout = ParallelismConfig()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward
    assert isinstance(plugin.cpu_offload, CPUOffloadPolicy) == offloads
    assert plugin.transformer_cls_names_to_wrap == VLMViTModel._no_split_modules
    assert args.use_parallelism_config == (sizes is not None)
    if sizes is not None:
        assert (layout.dp_replicate_size, layout.dp_shard_size) == sizes
        assert layout.total_size == args.num_processes == sizes[1] * args.num_machines
        assert layout.dp_dim_names == ["dp_replicate", "dp_shard"]


def test_tensor_parallelism_reaches_the_arguments(monkeypatch):
    monkeypatch.setattr(LayoutArguments, "world_size", 8)
    monkeypatch.setattr(LayoutArguments, "process_index", 5)
    arguments = functools.partial(LayoutArguments, use_cpu=True)
    launch, environment = engine("tensor_parallel")
    with patch_environment(**environment):
        assert ParallelismConfig().total_size == launch.num_processes == 8
        found = arguments()
        assert (found.layout.tp_size, found.layout.fsdp_size) == (2, 4)
        assert (found.data_rank, found.num_data_ranks) == (2, 4)
        with pytest.raises(ValueError, match=r"tp_size is 4, but the launcher's is 2"):
            arguments(tp_size=4)
    assert "PARALLELISM_CONFIG_TP_SIZE" not in engine("expert_parallel")[1]
    found = arguments(ep_size=8)
    assert (found.layout.ep_size, found.layout.fsdp_size, found.num_data_ranks) == (8, 8, 8)
    for message, sizes in {
        "ep_size is 3, but must be a multiple of tp_size": {"ep_size": 3},
        "tp_size is 3, but there are 8 ranks": {"tp_size": 3},
        "tp_size and ep_size must be 1 or more": {"tp_size": 0},
    }.items():
        with pytest.raises(ValueError, match=message):
            arguments(**sizes)
    with (
        patch_environment(ACCELERATE_USE_FSDP="true"),
        pytest.raises(ValueError, match="start the ranks without FSDP"),
    ):
        arguments(tp_size=2)


def test_what_cannot_be_divided_is_refused():
    with pytest.raises(ValueError, match=r"tp_size is 4, but backbone.layers.0.attention has 2 heads"):
        divide(build("mae"), DistributedConfig(tp_size=4))
    with pytest.raises(ValueError, match=r"ep_size is 2, but the encoder is dense"):
        divide(build("mae"), DistributedConfig(fsdp_size=2, ep_size=2))
    with pytest.raises(ValueError, match=r"ep_size is 3, but the encoder has 4 experts per layer"):
        divide(build("mae_sparse"), DistributedConfig(fsdp_size=3, ep_size=3))
    args = SimpleNamespace(layout=DistributedConfig(tp_size=2), method="detection")
    with pytest.raises(ValueError, match=r"divide encoders while they are pretrained, but detection trains a head"):
        check_divisible(args, find_model("detection"))


def test_deepspeed_reads_its_stage():
    _, environment = engine("deepspeed_zero3")
    with patch_environment(**environment):
        plugin = DeepSpeedPlugin()
    zero = plugin.deepspeed_config["zero_optimization"]
    assert (zero["stage"], zero["stage3_gather_16bit_weights_on_model_save"]) == (3, True)
    assert zero["offload_param"]["device"] == zero["offload_optimizer"]["device"] == "none"
    assert plugin.zero3_init_flag is False


def test_what_training_would_do_wrong_is_refused():
    def accelerator(stage=None, **sizes):
        state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage))
        kind = DistributedType.FSDP if stage is None else DistributedType.DEEPSPEED
        layout = ParallelismConfig(**sizes) if sizes else None
        return SimpleNamespace(parallelism_config=layout, distributed_type=kind, state=state)

    student, with_teacher = build("mae"), build("ijepa")
    for model in (student, with_teacher):
        check_layout(model, accelerator())
        check_layout(model, accelerator(dp_replicate_size=2, dp_shard_size=8))
        check_layout(model, accelerator(stage=2))
        for asked in ("tp", "cp"):
            with pytest.raises(ValueError, match=f"asks for {asked} parallelism"):
                check_layout(model, accelerator(**{f"{asked}_size": 2, "dp_shard_size": 2}))
    student._tp_size = 2
    check_layout(student, accelerator(tp_size=2, dp_shard_size=2))
    check_layout(student, accelerator(stage=3))
    with pytest.raises(ValueError, match=r"has a teacher .* ZeRO 3 leaves empty"):
        check_layout(with_teacher, accelerator(stage=3))


@pytest.fixture
def cluster(tmp_path):
    """Programs of a SLURM cluster, this being its second machine; the launcher runs until its file `go` is there."""
    programs = {
        "srun": 'export SLURM_NODEID=1; exec "$@"',
        "scontrol": 'if [ "$1" = show ]; then printf "first\\nsecond\\n"; else echo "$@" >> requeued; fi',
        "scancel": 'echo "$@" > cancelled; kill -TERM "$(cat pid)"',
        "accelerate": 'printf "%s\\n" "$@" > words; trap "exit 143" TERM; echo $$ > pid.new; mv pid.new pid\n'
        "while [ ! -e go ]; do sleep 0.02; done; exit $(cat go)",
    }
    for name, script in programs.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return tmp_path


def submit(cluster, *words, **variables):
    """The job's script, whose launcher runs."""
    slurm = {"SLURM_JOB_ID": "123456", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_NODELIST": "x"}
    path = f"{cluster / 'bin'}:{os.environ['PATH']}"
    job = subprocess.Popen(["bash", SLURM, *words], cwd=cluster, env=os.environ | slurm | variables | {"PATH": path})
    deadline = time.monotonic() + 20
    while not (cluster / "pid").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return job


def test_a_job_that_reaches_its_time_limit_saves_and_is_queued_again(cluster):
    job = submit(cluster, "pretrain", "mae/vit_small.yaml", "--data", "two words")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(20) == 143
    assert (cluster / "cancelled").read_text() == "--signal=TERM 123456\n"
    assert (cluster / "requeued").read_text() == "requeue 123456\n"


@pytest.mark.parametrize("status", [0, 2])
def test_a_job_that_ends_by_itself_is_not_queued_again(cluster, status):
    config = str(shipped_folder("recipes") / "accelerate" / "hsdp.yaml")
    job = submit(cluster, "pretrain", "mae/vit_small.yaml", "--data", "two words", ACCELERATE_CONFIG=config)
    (cluster / "go").write_text(str(status))
    assert job.wait(20) == status
    assert not (cluster / "requeued").exists()
    words = (cluster / "words").read_text().splitlines()
    assert words.pop(0) == "launch"
    args, environment = launched(words)
    assert (args.machine_rank, args.num_machines, args.num_processes) == (1, 2, 16)
    assert (args.main_process_ip, args.main_process_port) == ("first", 20000 + 123456 % 10000)
    assert args.training_script_args == [
        *("pretrain", "mae/vit_small.yaml", "--data", "two words", "--resume_from_checkpoint", "auto")
    ]
    with patch_environment(**environment):
        assert ParallelismConfig().total_size == 16


def test_skypilot_runs_what_the_launcher_takes():
    task = yaml.safe_load(SKYPILOT.read_text())
    values = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    values |= {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_TASK_ID": "task", **task["envs"]}
    script = 'accelerate() { printf "%s\\0" "$@"; }\n' + task["run"]
    printed = subprocess.run(
        ["bash", "-euc", script], env=os.environ | values, capture_output=True, text=True, check=True
    )
    words = printed.stdout.split("\0")[1:-1]
    words[words.index("--config_file") + 1] = str(shipped_folder("recipes") / "accelerate" / "multi_node.yaml")
    args, _ = launched(words)
    assert (args.machine_rank, args.num_processes, args.main_process_ip) == (1, 16, "10.0.0.1")
    assert args.training_script_args[:2] == ["pretrain", "recipes/mae/vit_small.yaml"]
