"""The `edge-kv` command, also as `python -m edge_kv`: signals are heard before much is imported."""

import sys

from edge_kv.signals import INTERRUPTED, end_on_signals, ended_by


def main() -> None:
    """Entry point of the `edge-kv` script."""
    try:
        end_on_signals()
        from edge_kv.cli import main as command

        command()
    except KeyboardInterrupt:  # while modules were loaded: commands answer it themselves
        print("Interrupted.", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except Exception:
        if status := ended_by():  # a module was being loaded, which made an error of its own of it
            raise SystemExit(status) from None
        raise


if __name__ == "__main__":
    main()
