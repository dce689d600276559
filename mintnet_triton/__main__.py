"""The command line: ``python -m mintnet_triton``."""

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run what it asks for."""
    parser = argparse.ArgumentParser(prog="python -m mintnet_triton", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo", help="train a small flow on real digits, verify it, sample, draw"
    )
    demo.add_argument("--data", choices=("digits", "mnist5k"), default="digits")
    demo.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for the results")
    options = parser.parse_args(arguments)

    try:
        # Here, for the recipes need more packages than the library does.
        from mintnet_triton.recipes.demo import run_demo

        verified = run_demo(options.data, options.out)
    except ModuleNotFoundError as error:
        print(f"{error}: pip install 'mintnet-triton[demo]'", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"cannot write to {options.out}: {error}", file=sys.stderr)
        return 1
    except ArithmeticError as error:
        print(error, file=sys.stderr)
        return 1
    return 0 if verified else 1


if __name__ == "__main__":
    sys.exit(main())
