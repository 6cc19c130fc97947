"""`hf-vlm doctor`"""

from collections import Counter
from collections.abc import Sequence

from hf_vlm.cli.options import Parser


def run(argv: Sequence[str]) -> None:
    """Examines the installation and the machine; ValueError where something is wrong."""
    parser = Parser(
        prog="hf-vlm doctor",
        description="Examines Python, packages, devices, memory, disks and the Hub, and says what to type where "
        "something is wrong. Ends with status 2 if so, else 0.",
    )
    parser.parse_args(argv)

    from hf_vlm.data.io.messages import printable
    from hf_vlm.deploy.doctor.examine import examine

    levels: Counter[str] = Counter()
    wrong = []
    for finding in examine():
        levels[finding.level] += 1
        print(f"{finding.level:<8}{printable(finding.text)}", flush=True)
        if finding.advice:
            print(f"{'':<8}  {finding.advice}")
        if finding.level == "wrong":
            wrong.append(finding.text)
    if wrong:
        raise ValueError("; ".join(wrong))
    warnings = levels["warning"]
    print("ok" + (f", with {warnings} {'warning' if warnings == 1 else 'warnings'}" if warnings else ""))
