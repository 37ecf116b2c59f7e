"""Host time of a forward pass and of a train step beside torchvision's eager: `resnet-fused bench --suite host`."""

import sys

from resnet_fused.bench import host

if __name__ == "__main__":
    sys.exit(host.main(sys.argv[1:]))
