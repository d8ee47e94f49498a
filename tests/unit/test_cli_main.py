from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field, fields

import pytest

from alisa import __version__
from alisa.cli.files import STANDARD_INPUT
from alisa.cli.generate import Generate
from alisa.cli.main import COMMANDS, main, parse
from alisa.cli.signals import Stopped
from alisa.config import EngineConfig, SamplingParams
from alisa.errors import CapacityError, InputError


def parse_generate(*options: str) -> Generate:
    command = parse(["generate", *options])
    assert isinstance(command, Generate)
    return command


def test_prompts_and_options_in_any_order():
    args = parse_generate("a b", "c", "--stop", "x", "--max-tokens", "5", "--stop", "y z", "--ignore-eos", "--json")
    assert args.prompts == ("a b", "c")
    assert args.sampling == SamplingParams(max_tokens=5, stop=("x", "y z"), ignore_eos=True)
    assert args.display.json
    assert not args.verify
    assert parse_generate("--stop", "x", "a b").prompts == ("a b",)
    assert parse_generate("--", "-a", "--b").prompts == ("-a", "--b")
    assert parse_generate("--input", "-").files.input == STANDARD_INPUT


def test_defaults_are_those_of_the_library():
    args = parse_generate("a")
    assert args.engine == EngineConfig()
    assert args.sampling == SamplingParams()


def test_memory_is_written_with_a_unit():
    assert parse_generate("a", "--kv-device-memory", "2GiB").engine.kv_device_memory == "2GiB"


def test_help_names_every_option_with_its_default_and_an_example(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["generate", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    args = Generate()
    groups = (args.files, args.engine, args.sampling, args.display)
    names = [option.name for group in groups for option in fields(group)]
    names += ["chat", "verify", "tools", "chat_template_kwargs", "sampling"]
    assert not [name for name in names if f"--{name.replace('_', '-')}" not in text]
    assert "[PROMPT ...]" in text
    assert "(default: 1024)" in text
    assert 'alisa generate "The ship' in text


def test_a_new_engine_option_is_a_flag_with_its_help(capsys):
    for words in (["more", "--help"], ["more", "--depth", "x"]):
        with pytest.raises(SystemExit):
            main(words, {"more": MoreCommand})
    captured = capsys.readouterr()
    assert "--depth INT" in captured.out
    assert "How deep. (default: 3)" in captured.out
    assert "--depth" in captured.err
    assert parse(["more", "--depth", "5", "--policy", "swa"], {"more": MoreCommand}).engine == More(
        depth=5, policy="swa"
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command_has_an_example(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([*name.split(), "--help"])
    text = capsys.readouterr().out
    assert f"usage: alisa {name} " in text
    assert f"\n  alisa {name}" in text


def test_old_flags_work_with_one_line_of_warning(capsys):
    for words in (["--max-batch", "3"], ["--max-batch=3"], ["--max_batch", "3"]):
        assert parse_generate("a", *words).engine == EngineConfig(max_num_seqs=3)
        assert capsys.readouterr().err == (
            "alisa: --max-batch is called --max-num-seqs now; the old name will go with version 0.3.\n"
        )
    assert parse_generate("--", "--max-batch").prompts == ("--max-batch",)
    assert capsys.readouterr().err == ""


def test_top_help_lists_every_command(capsys):
    for argv in ([], ["-h"], ["--help"]):
        with pytest.raises(SystemExit, match="0"):
            main(argv)
        text = capsys.readouterr().out
        assert not [name for name in COMMANDS if f"• {name.split()[0]} " not in text]
        assert "For instance" not in text, "one line each"


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"alisa {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generat"], "There is no command 'generat'; did you mean generate?"),
        (["xyz"], "alisa --help lists the commands"),
        (["bench", "kernel"], "There is no command 'bench kernel'; did you mean bench kernels?"),
        (["generate", "a", "--seed", str(2**64)], "seed is 18446744073709551616, allowed is 0 up to but not 2**64"),
        (["generate"], "There is no prompt"),
        (["generate", "a", "--max-tokens", "0"], "max_tokens is 0, at least 1 is needed"),
        (["generate", "a", "--sparsity", "1"], "sparsity is 1.0, allowed is 0 (dense) up to but not 1"),
        (["generate", "a", "--kv-device-memory", "lots"], "'lots' is not a memory size; write for example 2GiB"),
        (["generate", "--input", "none.jsonl"], "none.jsonl cannot be read: No such file or directory"),
    ],
)
def test_what_the_caller_can_mend_is_one_line_and_status_2(argv, message, capsys):
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("alisa: error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


@pytest.mark.parametrize("options", [["--polcy", "swa"], ["a", "--policy", "best"], ["--max-tokens", "many"]])
def test_usage_errors_exit_with_status_2(options, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["generate", *options])
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err


@dataclass(frozen=True, slots=True, kw_only=True)
class More(EngineConfig):
    """More."""

    depth: int = 3
    """How deep."""


@dataclass(frozen=True, kw_only=True)
class MoreCommand:
    """Has one more option."""

    engine: More = field(default_factory=More)

    def run(self) -> int:
        return 0


@dataclass(frozen=True)
class Failing:
    """Fails."""

    kind: str = "capacity"

    def run(self) -> int:
        if self.kind == "capacity":
            raise CapacityError("Too little.")
        if self.kind == "interrupt":
            raise KeyboardInterrupt
        if self.kind == "stop":
            raise Stopped
        if self.kind == "bug":
            raise ZeroDivisionError
        raise InputError("Wrong.")


def test_errors_of_a_command_become_exit_statuses(capsys):
    commands = {"fail": Failing}
    assert main(["fail"], commands) == 2
    assert capsys.readouterr().err == "alisa: error: Too little.\n"
    assert main(["fail", "--kind", "interrupt"], commands) == 130
    assert main(["fail", "--kind", "stop"], commands) == 143
    with pytest.raises(ZeroDivisionError):
        main(["fail", "--kind", "bug"], commands)


@pytest.mark.parametrize(
    "argv",
    [
        ["--version"],
        ["--help"],
        ["generate", "--help"],
        ["generate"],
        ["generate", "--input", "none.txt"],
        ["bench"],
        ["bench", "kernels", "--help"],
        ["doctor", "--help"],
    ],
)
def test_quick_answers_do_not_import_torch(argv):
    code = (
        "import sys\n"
        "from alisa.cli.main import main\n"
        "try:\n"
        f"    main({argv!r})\n"
        "except SystemExit:\n"
        "    pass\n"
        "slow = {'torch', 'numpy', 'transformers', 'alisa.llm'} & set(sys.modules)\n"
        "sys.exit(f'imported {slow}' if slow else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_public_names_are_found_and_others_are_not():
    import alisa

    assert alisa.SamplingParams is SamplingParams
    assert dir(alisa) == ["LLM", "SamplingParams", "__version__"]
    with pytest.raises(AttributeError, match="no attribute 'LMM'"):
        alisa.LMM  # noqa: B018
