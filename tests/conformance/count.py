"""Run diffusers' own shared tests of pipelines, models and autoencoders on ours, and count the results.

The tests are not in diffusers' package: pass a checkout of its repository at the installed release. They
import two more packages, requests_mock and parameterized.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from promag.training.command_line import Parser, run_main
from promag.training.config import UserError
from promag.training.run import append_result

CASES = Path(__file__).with_name("cases.py")


def main(argv: Sequence[str]) -> int:
    """Print the counts of every mixin and the reasons for skipped and failed tests; with --record append them as a line."""
    parser = Parser(__doc__)
    parser.add_argument("checkout", type=Path, help="folder that holds diffusers' tests/")
    parser.add_argument("--tests-from", required=True, help="version and commit of that checkout, for the record")
    parser.add_argument("--only", help="run tests whose names match, in pytest's words for -k")
    parser.add_argument("--record", type=Path, help="append a JSON line with commit and machine to this results file")
    arguments = parser.parse_args(argv)
    if not (arguments.checkout / "tests" / "pipelines" / "testing_utils").is_dir():
        raise UserError(f"{arguments.checkout}: has no tests/pipelines/testing_utils; a checkout of diffusers is needed")
    rows = summary(run(arguments.checkout, arguments.only))
    for row in rows:
        print(f"{row['class']}: {row['passed']} passed, {len(row['failed'])} failed, {sum(row['skipped'].values())} skipped")
        for line in (*(f"failed {name}: {why}" for name, why in row["failed"].items()), *_reasons(row["skipped"])):
            print(f"    {line}")
    totals = {key: sum(row[key] for row in rows) for key in ("passed", "safetensors_for_pickle")}
    totals |= {"failed": sum(len(row["failed"]) for row in rows), "skipped": sum(sum(r["skipped"].values()) for r in rows)}
    print(totals)
    if arguments.record:
        record = {"what": "conformance", "tests_from": arguments.tests_from, "device": "cpu", **totals, "rows": rows}
        append_result(arguments.record, record)
    return 0


def run(checkout: Path, only: str | None) -> ET.Element:
    """Run the cases in a process in which `tests` is diffusers' package; return pytest's report."""
    with tempfile.TemporaryDirectory() as folder:
        report, cases = Path(folder) / "report.xml", Path(folder) / "cases.py"
        shutil.copy(CASES, cases)  # beside our tests, pytest would take `tests` for our package
        command = [sys.executable, "-m", "pytest", str(cases), "-q", "--import-mode=importlib", f"--junitxml={report}"]
        command += ["-c", os.devnull, "--rootdir", folder, "-p", "no:cacheprovider", "-W", "ignore", "--tb=line"]
        command += ["-k", only] if only else []
        paths = [str(checkout.resolve()), str(CASES.parents[2]), os.environ.get("PYTHONPATH", "")]
        environment = {"HF_HUB_OFFLINE": "1", "DIFFUSERS_TEST_DEVICE": "cpu", "PYTHONSAFEPATH": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        status = subprocess.run(command, env={**os.environ, **environment}).returncode
        if status not in (0, 1):
            raise UserError(f"pytest ended with status {status}: see above")
        return ET.parse(report).getroot()


def summary(report: ET.Element) -> list[dict[str, Any]]:
    """Return a row for each class of a report: passed tests, failed ones, and the number skipped for each reason."""
    rows: dict[str, dict[str, Any]] = {}
    for case in report.iter("testcase"):
        name = case.attrib["classname"].rsplit(".", 1)[-1].removeprefix("Test")
        empty = {"class": name, "passed": 0, "safetensors_for_pickle": 0, "failed": {}, "skipped": Counter()}
        row = rows.setdefault(name, empty)
        wrong = [found for kind in ("failure", "error") if (found := case.find(kind)) is not None]
        if wrong:
            message = wrong[0].attrib["message"].splitlines()[0]
            row["failed"][case.attrib["name"]] = re.sub(r"/\S*/", "", message)  # file names without their temporary folders
        elif (skipped := case.find("skipped")) is not None:
            row["skipped"][skipped.attrib["message"]] += 1
        else:
            row["passed"] += 1
            row["safetensors_for_pickle"] += any(p.attrib["name"] == "asked_for" for p in case.iter("property"))
    return list(rows.values())


def _reasons(skipped: Counter[str]) -> list[str]:
    return [f"skipped {count}: {why}" for why, count in skipped.items()]


if __name__ == "__main__":
    raise SystemExit(run_main(main))
