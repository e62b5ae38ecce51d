#!/bin/sh
# Run by Snakemake inside the new environment, at the repository's root. `- pip: [-r ...]` in environment.yaml would not
# be found: conda looks beside the file, and Snakemake gives it a copy in .snakemake/conda.
exec python -m pip install --requirement requirements.lock
