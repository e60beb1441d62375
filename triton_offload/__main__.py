"""`python -m triton_offload`: the command line."""

from triton_offload.cli.main import main

if __name__ == "__main__":
    main()
