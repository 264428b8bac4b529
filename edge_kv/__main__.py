"""`python -m edge_kv`: the same as the `edge-kv` command."""

from edge_kv.cli import main

if __name__ == "__main__":
    main()
