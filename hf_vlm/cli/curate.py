"""`hf-vlm curate SHARDS OUTPUT_DIR [--num_images 1000000]`"""

import dataclasses
import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from hf_vlm.cli.options import Parser, check_positive

EXECUTORS = ("slurm", "ray")


def run(argv: Sequence[str]) -> None:
    """Writes shards of the images worth training on, with a report of what was dropped; continues what was stopped."""
    parser = Parser(
        prog="hf-vlm curate",
        description="Reads shards of images, Parquet files or WebDataset tars, drops what is unreadable, small, blank "
        "or there more than once, chooses the rest evenly over clusters of what they show, and writes shards of the "
        "same format, with all columns, and a report with pictures of what was dropped. Stopped, it continues when "
        "started again.",
    )
    parser.add_argument("data", help="Parquet files or tars: one, several (data/{000..999}.tar), or a folder of them")
    parser.add_argument("output_dir", type=Path, help="folder for the shards that are kept; shared by all machines")
    parser.add_argument("--split", default="train")
    parser.add_argument("--num_images", type=int, help="images to keep, even over clusters; all that are left if not")
    parser.add_argument("--min_side", type=int, default=32, help="pixels of the shorter side (32)")
    parser.add_argument("--max_aspect", type=float, default=4.0, help="longer side over shorter side (4)")
    parser.add_argument("--min_entropy", type=float, default=1.0, help="bits of the grey levels (1)")
    parser.add_argument("--min_sharpness", type=float, default=0.0, help="variance of the Laplacian (0: all)")
    parser.add_argument("--encoder", help="folder or Hub id whose features are compared, in place of pixels")
    parser.add_argument(
        "--similarity", type=float, help="cosine from which on two are near duplicates (0.9, with an encoder 0.96)"
    )
    parser.add_argument("--num_clusters", type=int, help="of the lowest level (the square root of the images)")
    parser.add_argument("--images_per_shard", type=int, default=10_000, help="most images of a shard (10000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_workers", type=int, default=1, help="processes of this machine (1)")
    parser.add_argument("--executor", choices=EXECUTORS, help="run on a cluster by datatrove (hf_vlm[curate])")
    parser.add_argument("--tasks", type=int, default=64, help="of the cluster, for each stage (64)")
    parser.add_argument(
        "--executor_options", default="{}", help='JSON for the executor: \'{"partition": "cpu", "time": "10:00:00"}\''
    )
    arguments = parser.parse_args(argv)
    check_positive(arguments, "num_workers", "tasks")

    from hf_vlm.curation.work import CurationOptions, open_work

    names = [field.name for field in dataclasses.fields(CurationOptions)]
    options = CurationOptions(**{name: getattr(arguments, name) for name in names})
    executor_options = _as_object(arguments.executor_options)
    work = open_work(arguments.data, arguments.output_dir, split=arguments.split, options=options)

    from hf_vlm.curation.report import VALUES, report_path
    from hf_vlm.curation.run import run_locally, run_on_cluster

    if arguments.executor is not None:
        run_on_cluster(work, arguments.executor, num_tasks=arguments.tasks, options=executor_options)
    else:
        run_locally(work, num_workers=arguments.num_workers)
    page = report_path(work, 0)
    if not page.exists():  # Slurm's jobs wait in its queue
        print(f"The stages are submitted; at their end the report is in {page}")
        return
    values = json.loads((work.folder / VALUES).read_text())
    print(f"{values['num_kept']:,} of {values['num_images']:,} images are kept; dropped:")
    print("\n".join(f"  {count:>12,}  {name}" for name, count in values["dropped"].items() if count))
    print(f"What was dropped, with pictures: {page}")
    print(f"Next: {shlex.join(['hf-vlm', 'pretrain', '--data', str(arguments.output_dir)])}")


def _as_object(text: str) -> dict[str, object]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--executor_options {text}: it is no JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f'--executor_options {text}: give an object, as {{"partition": "cpu"}}')
    return value
