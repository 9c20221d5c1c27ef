#!/usr/bin/env python3
"""Megatron distributed checkpoint -> Hugging Face folder.

tools/convert_megatron_to_hf.py --source FOLDER --out HF [--parallel.tp 2]
"""

import sys

from megatron_aligndistil.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["convert", "--to", "hf", *sys.argv[1:]]))
