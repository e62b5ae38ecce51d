#!/bin/sh
# Snakemake runs this in the new environment, in the repository's root. `- pip: [-r ...]` in environment.yaml would fail:
# conda searches the file's folder, and Snakemake passes a copy of the file in .snakemake/conda.
exec python -m pip install --requirement requirements.lock
