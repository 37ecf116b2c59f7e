"""`resnet-fused bench` in this process."""

import argparse

from resnet_fused import bench


def run_command(*argv):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return bench.main(parser.parse_args([str(argument) for argument in argv]))


def by_name(report):
    return {result.variant: result for result in report.results}
