"""Does `verify` say in words what is wrong? The single faults of the mutation study, with the kinds that are right.

Each fault is put into a network as `mutations.py` does it, and verify's first guess at the place of the fault is compared with the
kinds that describe it. Faults that need not be found, and pairs that verify refuses to compare, are left out.

    python benchmarks/guesses.py --subjects resnet vgg --dtypes float32 --histories lineage none
    python benchmarks/guesses.py --finished --write-docs         # and docs/verify.md
"""
