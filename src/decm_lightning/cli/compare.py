"""decm compare: one report on several runs."""

from pathlib import Path

from decm_lightning.cli.targets import check_device
from decm_lightning.image_writer import check_plots


def compare(
    runs: list[str],
    out: str = "report.html",
    triangle: bool = True,
    device: str = "cpu",
    trust: bool = False,
) -> None:
    """Compare runs in one report: quality, gradient norms, cost, samples, error on the triangle, and settings.

    Args:
        runs: at least two folders with a quality.json of decm test, or exported folders with a record.
        out: an .html file, one page that needs no network and no other file; or an .md file with its images next to it.
        triangle: measure the error of each student against its teacher's trajectories.
        device: the device, such as cpu or cuda.
        trust: allow classes from outside this package that a run names; importing their modules runs their code.
    """
    check_device(device)
    check_plots()
    # Imports matplotlib, which may be missing.
    from decm_lightning.compare.report import compare as write_report

    files = write_report(runs, Path(out), triangle, device, trust)
    print(f"wrote {', '.join(map(str, files))}")
