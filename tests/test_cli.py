"""The command line: quick help, readable screens, one-line errors with their exit codes."""

import dataclasses
import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from model_files import make_potential

import mlip_md
from mlip_md import bundled, cli, errors, native
from mlip_md.formats.names import NAMES
from mlip_md.formats.open import FORMATS
from mlip_md.formats.own import load, save
from mlip_md.signals import EXIT_KEYBOARD, EXIT_SAVED

COMMANDS = [
    "md", "minimize", "train", "check", "evaluate", "prepare", "make-dataset", "show", "convert",
]  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    file = tmp_path_factory.mktemp("models") / "tiny.safetensors"
    save(make_potential("mace"), file)
    return file


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line in this process: (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mlip-md", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "100")
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return end.value.code or 0, out, err

    return run


def test_help_is_quick_and_loads_nothing_heavy():
    heavy = ["jax", "flax", "openmm", "ase", "h5py", "optax", "matplotlib", "numpy"]
    code = f"""
import sys
sys.argv = ["mlip-md", "--help"]
from mlip_md.cli import main
try:
    main()
except SystemExit as end:
    loaded = [name for name in {heavy} if name in sys.modules]
    sys.exit(f"loaded {{loaded}}" if loaded or end.code else 0)
"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert seconds < 1.5
    for command in COMMANDS:
        assert re.search(rf"│ {command} ", done.stdout), command


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_its_own_help(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert f"Usage: mlip-md {command}" in out


def test_version(run):
    said = f"mlip-md {mlip_md.__version__}\nconvolution on processors: {native.describe()}\n"
    assert run("--version") == (0, said, "")


def test_show_tells_everything(run, tiny):
    code, out, err = run("show", tiny)
    assert (code, err) == (0, "")
    for text in (
        "mace", "4.1 Å; an atom sees up to 8.2 Å", "H C O", "energy eV", "num_channels", "4x0e",
        "7.3 neighbors", "0.97 Å", "0.25 eV + 1.75", "-1029.489000", "data.structures", "µ",
    ):  # fmt: skip
        assert text in out, text
    potential = load(tiny)
    assert f"{potential.num_parameters:,}" in out
    assert potential.sha256[:40] in out.replace("\n", "")


def test_show_as_json(run, tiny):
    code, out, _ = run("show", tiny, "--json")
    potential = load(tiny)
    shown = json.loads(out)
    assert code == 0
    assert shown["sha256"] == potential.sha256
    assert shown["hyperparameters"]["num_channels"] == 4
    assert shown["atomic_energies"] == potential.atomic_energies.tolist()


def test_show_prints_the_card_of_a_bundled_model(run, tiny, monkeypatch):
    monkeypatch.setattr(bundled, "_FOLDER", tiny.parent)
    (tiny.parent / "tiny.md").write_text("# A tiny card\n\nMade for *tests*.\n")
    code, out, _ = run("show", "tiny")
    assert code == 0
    assert "A tiny card" in out
    assert "Made for tests." in out


def test_convert_there_and_back(run, tiny, tmp_path):
    there, back = tmp_path / "m.zip", tmp_path / "m.safetensors"
    code, out, _ = run("convert", tiny, there)
    assert code == 0
    assert f"{load(tiny).num_parameters:,} parameters" in out
    assert run("convert", there, back)[0] == 0
    old, new = load(tiny), load(back)
    assert new.config == dataclasses.replace(old.config, atomic_energies="average")
    np.testing.assert_array_equal(new.atomic_energies, old.atomic_energies)
    code, _, err = run("convert", there, back)
    assert code == 2
    assert "--force" in err
    assert run("convert", there, back, "--force")[0] == 0


def test_convert_to_a_format_names_the_file_itself(run, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("convert", tiny, "--to", "instadeep")[1].startswith("tiny.zip: ")
    assert run("convert", tmp_path / "tiny.zip", "--to", "mlip-md")[0] == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["tiny.safetensors", "tiny.zip"]
    np.testing.assert_array_equal(
        load(tmp_path / "tiny.safetensors").atomic_energies, load(tiny).atomic_energies
    )


def test_convert_refuses_unknown_formats_and_folders(run, tiny, tmp_path):
    code, _, err = run("convert", tiny, tmp_path / "m.onnx")
    assert (code, "write .safetensors or .zip" in err) == (2, True)
    code, _, err = run("convert", tiny, tmp_path / "m.safetensors", "--to", "instadeep")
    assert (code, "write .zip" in err) == (2, True)
    code, _, err = run("convert", tiny, "--to", "torch")
    assert (code, "unknown format 'torch'" in err) == (2, True)
    code, _, err = run("convert", tiny)
    assert (code, "a format with --to" in err) == (2, True)
    code, _, err = run("convert", tiny, tmp_path / "none" / "m.zip")
    assert (code, "there is no folder" in err) == (2, True)
    assert list(tmp_path.iterdir()) == []


def test_convert_between_formats_that_share_an_ending_or_are_only_read(
    run, tiny, tmp_path, monkeypatch
):
    monkeypatch.setitem(FORMATS, "other", FORMATS["instadeep"])
    monkeypatch.setitem(FORMATS, "old", FORMATS["instadeep"]._replace(save=None))
    code, _, err = run("convert", tiny, tmp_path / "m.zip")
    assert (code, "write --to instadeep or --to other" in err) == (2, True)
    assert run("convert", tiny, tmp_path / "m.zip", "--to", "other")[0] == 0
    code, _, err = run("convert", tiny, tmp_path / "n.zip", "--to", "old")
    assert (code, "'old', or one only read; write --to mlip-md or" in err) == (2, True)


def test_help_names_every_format(run):
    for command in ("show", "convert", "md"):
        text = " ".join(run(command, "--help")[1].replace("│", " ").split())
        names = ".safetensors file, InstaDeep .zip, mace-torch .model or run folder."
        assert f"Bundled name, {names}" in text
    assert {name: known[:2] for name, known in FORMATS.items()} == NAMES


def test_convert_into_a_folder_is_refused(run, tiny, tmp_path):
    (tmp_path / "m.zip").mkdir()
    code, _, err = run("convert", tiny, tmp_path / "m.zip", "--force")
    assert (code, err.endswith("m.zip is a folder; name a file\n")) == (2, True)


def test_errors_of_the_operating_system_name_the_users_file(run, monkeypatch):
    def fail(model, head=None):
        raise OSError(28, "No space left on device", ".m.zip.bc8c.tmp", None, "m.zip")

    monkeypatch.setattr(mlip_md, "load", fail)
    assert run("show", "x")[::2] == (5, "Error: m.zip: No space left on device\n")


@pytest.fixture(scope="module")
def compiled():
    """The bundled potential, kept so that runs of the same molecule share what is compiled."""
    from mlip_md.engine import Engine
    from mlip_md.integrations.md.structures import read_structure

    engine = Engine(mlip_md.load("organics-gfn2"))
    atoms = read_structure().atoms
    engine.evaluate(atoms.positions, atoms.numbers)
    return engine


@pytest.mark.parametrize("engine", ["ase", "openmm"])
def test_the_main_job(run, tmp_path, monkeypatch, compiled, engine):
    """``mlip-md md`` with the bundled model and molecule, only shorter."""
    from mlip_md.integrations.md import files, report

    monkeypatch.chdir(tmp_path)
    code, out, err = run("md", "--engine", engine, "--steps", 24, "--no-minimize")
    assert (code, err) == (0, "")
    assert out.startswith("paracetamol: NVT at 300 K")
    assert "step 24/24 100%" in out
    folder = tmp_path / "md-paracetamol-1"
    assert {file.name for file in folder.iterdir()} == {n for n, _ in report.list_contents(folder)}
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert (summary["status"], summary["step"]) == ("finished", 24)
    assert summary["model_sha256"] == compiled.potential.sha256
    log = files.read_log(folder / "log.csv")
    np.testing.assert_array_equal(log["step"], [0, 10, 20, 24])
    assert np.ptp(log["total_eV"]) < 1.0
    code, out, err = run("md", "--restart", folder)
    assert (code, out) == (5, "")
    assert "--steps or --length" in err


def test_errors_are_one_line_without_traceback(run, tmp_path):
    (tmp_path / "m.safetensors").write_bytes(b"nonsense and more")
    code, out, err = run("show", tmp_path / "m.safetensors")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("Error: ")
    assert "no safetensors file" in err


@pytest.mark.parametrize("arguments", [["--debug", "show", "none"], ["show", "none", "--debug"]])
def test_debug_raises(monkeypatch, arguments):
    monkeypatch.setattr(sys, "argv", ["mlip-md", *arguments])
    with pytest.raises(errors.ModelFileError):
        cli.main()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (errors.StructureError("x"), 2),
        (errors.ConfigError("x"), 2),
        (errors.ModelFileError("x"), 2),
        (errors.UnsupportedElementError("x"), 2),
        (FileNotFoundError(2, "no such file", "x.xyz"), 2),
        (errors.DataError("x"), 3),
        (errors.NonFiniteError("x"), 4),
        (errors.SimulationError("x"), 4),
        (errors.CheckpointError("x"), 5),
        (OSError(28, "No space left on device"), 5),
        (errors.OwnershipError("x"), 5),
        (errors.CapacityError("x"), 7),
        (errors.StoppedError("x"), 75),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(run, monkeypatch, error, expected):
    def fail(model: str, head: str | None = None) -> None:
        raise error

    monkeypatch.setattr(mlip_md, "load", fail)
    code, _, err = run("show", "anything")
    assert code == expected
    assert err.count("\n") == 1


def test_the_page_of_exit_codes_is_the_table_of_the_code():
    page = (Path(__file__).parents[1] / "docs" / "exit-codes.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| .* \| (.*)\|$", page, re.MULTILINE)
    listed = {name: int(code) for code, names in rows for name in re.findall(r"`(\w+)`", names)}
    assert listed.pop("KeyboardInterrupt") == EXIT_KEYBOARD
    assert listed == {kind.__name__: code for kind, code in cli.EXIT_CODES.items()}
    assert {int(code) for code, _ in rows} == {0, 1, EXIT_KEYBOARD, *cli.EXIT_CODES.values()}
    assert cli.EXIT_CODES[errors.StoppedError] == EXIT_SAVED


STREAMS = """
import sys
from mlip_md.streams import lasting_streams
with lasting_streams():
    from rich.console import Console
    from rich.table import Table
    import typer
    assert not sys.stdout.isatty()
    table = Table("speed …")
    table.add_row("0.1 ± 2 Å³")
    for number in range(100):
        Console().print(table)
        typer.echo("→ 1.5 eV/Å³ 日")
    typer.echo("done", err=True)
"""


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_every_terminal_prints(encoding):
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run(
        [sys.executable, "-c", STREAMS], capture_output=True, env=environment, check=True
    )
    text = done.stdout.decode("latin-1" if encoding == "latin-1" else "utf-8")
    assert text.count("0.1 ") == 100
    if encoding == "latin-1":
        for plain in ("speed ...", "0.1 ± 2 Å³", "-> 1.5 eV/Å³ ?"):
            assert plain in text


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
def test_a_reader_that_leaves_ends_the_printing_only():
    child = subprocess.Popen(
        [sys.executable, "-c", STREAMS], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.close()
    assert child.stderr.read() == b"done\n"
    assert child.wait(timeout=100) == 0


def test_errors_that_are_not_ours_keep_their_traceback(monkeypatch):
    def fail(model: str, head: str | None = None) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(mlip_md, "load", fail)
    monkeypatch.setattr(sys, "argv", ["mlip-md", "show", "anything"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_text_that_looks_like_markup_is_printed_as_it_is(run):
    _, _, err = run("show", "[red]none[/red]")
    assert "'[red]none[/red]'" in err


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_ctrl_c_from_outside(interruptible):
    code = """
import time, mlip_md
from mlip_md.cli import main
import sys
sys.argv = ["mlip-md", "show", "x"]
def wait(model, head):
    print("waiting", flush=True)
    time.sleep(240)
mlip_md.load = wait
main()
"""
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "waiting\n"
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=300)
    assert child.returncode == 130
    assert err == "Interrupted.\n"
