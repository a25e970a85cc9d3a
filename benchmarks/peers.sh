#!/usr/bin/env bash
# Environments of the programs that steps are raced against, in the folder that is given.
#
#     bash benchmarks/peers.sh FOLDER [NAME ...]
#
# Then: python benchmarks/steps.py --with mlip=FOLDER/mlip/bin/python ...
set -euo pipefail
folder=${1:?give a folder}
shift
[ $# -gt 0 ] || set -- mlip mace-torch symmetrix-xl

make() {
  python3 -m venv "$folder/$1"
  "$folder/$1/bin/pip" install --quiet --upgrade pip
  name_of=$1
  shift
  "$folder/$name_of/bin/pip" install --quiet "$@"
}

for name in "$@"; do
  case $name in
    mlip) make mlip 'mlip==0.2.5' 'jax<0.11' ase ;;
    mace-torch) make mace-torch 'torch==2.13.0' 'mace-torch==0.3.16' ;;
    symmetrix-xl) make symmetrix-xl 'torch==2.13.0' 'mace-torch==0.3.16' 'symmetrix-xl==0.1.1' ;;
    *) echo "unknown peer $name" >&2 && exit 2 ;;
  esac
done
