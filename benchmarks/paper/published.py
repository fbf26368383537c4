"""What the paper prints, to be shown beside what is measured here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Printed:
    """A row of a table: parameters in millions, MACs ("FLOPS") in thousands of millions, top-1 accuracy in per cent,
    and images per second on a V100."""

    parameters: float | None
    giga_macs: float
    accuracy: float
    images_per_second: float


CIFAR10 = {
    "ResNet 34": Printed(21.2, 1.16, 95.64, 8208.4),
    "DiracNet 34": Printed(21.1, 1.15, 94.83, 6299.64),
    "ResDistill 34": Printed(21.1, 1.16, 94.62, 9652.8),
    "RepVGG A2": Printed(24.1, 1.67, 95.35, 8099.7),
    "RMNet 26x3_32": Printed(8.8, 0.51, 95.81, 10078.2),
}
IMAGENET = {
    "ResNet 50": Printed(25.6, 4.11, 76.31, 1252.1),
    "ResDistill 50": Printed(25.6, 4.11, 76.08, 1494.4),
    "RMNet 41x4_8": Printed(11.2, 1.9, 77.80, 1460.4),
    "ResNeXt 50": Printed(25.0, 4.26, 78.41, 916.9),
    "RepVGG B1": Printed(51.8, 11.82, 78.31, 1123.2),
    "RMNet 41x5_16": Printed(23.9, 3.79, 78.5, 1185.8),
    "ResNet 101": Printed(44.5, 7.83, 77.21, 729.9),
    "VGG 16": Printed(138, 15.48, 72.21, 782.1),
    "RepVGG B2": Printed(80.3, 18.38, 78.78, 712.9),
    "RMNet 50x5_32": Printed(39.6, 6.88, 79.08, 849.8),
    "ResNet 152": Printed(60.19, 11.56, 77.78, 512.8),
    "RepVGG B3": Printed(111.0, 26.21, 79.26, 543.5),
    "RMNet 50x6_32": Printed(47.6, 8.26, 79.57, 713.8),
    "ResNeXt 101": Printed(88.8, 16.48, 79.88, 308.4),
    "RMNet 101x6_16": Printed(59.45, 11.11, 80.07, 461.5),
    "RMNet 152x6_32": Printed(126.92, 25.32, 80.36, 272.9),
}
# MACs in millions; the two converted rows have the same network.
TABLE_2 = {
    "MobileNetV2": Printed(None, 0.0834, 92.07, 19119),
    "RMNetV1": Printed(None, 0.0471, 92.07, 27720),
    "MobileNetV1": Printed(None, 0.0471, 91.31, 27720),
}
TABLE_3 = {
    "ResNet 18": Printed(11.7, 1.82, 71.146, 4548.59),
    "RepVGG 18": Printed(11.5, 1.80, 70.638, 4833.36),
    "ResNet 34": Printed(21.8, 3.67, 74.442, 2634.93),
    "RepVGG 34": Printed(21.6, 3.65, 73.67, 2772.17),
}


# The layers as printed, but for `inplace=True`: the normal form has nothing in place.
TABLE_4 = """
Conv2d(3, 64, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
ReLU()
Conv2d(64, 192, kernel_size=(1, 1), stride=(1, 1))
ReLU()
Conv2d(192, 192, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), groups=6)
ReLU()
Conv2d(192, 64, kernel_size=(1, 1), stride=(1, 1))
ReLU()
Conv2d(64, 192, kernel_size=(1, 1), stride=(1, 1))
ReLU()
Conv2d(192, 192, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), groups=6)
ReLU()
Conv2d(192, 64, kernel_size=(1, 1), stride=(1, 1))
ReLU()
Conv2d(64, 320, kernel_size=(1, 1), stride=(1, 1))
ReLU()
Conv2d(320, 320, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), groups=5)
ReLU()
Conv2d(320, 128, kernel_size=(1, 1), stride=(1, 1))
ReLU()
Conv2d(128, 384, kernel_size=(1, 1), stride=(1, 1))
ReLU()
Conv2d(384, 384, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), groups=6)
ReLU()
Conv2d(384, 128, kernel_size=(1, 1), stride=(1, 1))
ReLU()
Conv2d(128, 640, kernel_size=(1, 1), stride=(1, 1))
ReLU()
Conv2d(640, 640, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), groups=5)
ReLU()
Conv2d(640, 256, kernel_size=(1, 1), stride=(1, 1))
ReLU()
Conv2d(256, 768, kernel_size=(1, 1), stride=(1, 1))
ReLU()
Conv2d(768, 768, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), groups=6)
ReLU()
Conv2d(768, 256, kernel_size=(1, 1), stride=(1, 1))
ReLU()
Conv2d(256, 1280, kernel_size=(1, 1), stride=(1, 1))
ReLU()
Conv2d(1280, 1280, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), groups=5)
ReLU()
Conv2d(1280, 512, kernel_size=(1, 1), stride=(1, 1))
ReLU()
Conv2d(512, 1536, kernel_size=(1, 1), stride=(1, 1))
ReLU()
Conv2d(1536, 1536, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), groups=6)
ReLU()
Conv2d(1536, 512, kernel_size=(1, 1), stride=(1, 1))
ReLU()
AdaptiveAvgPool2d(output_size=1)
Flatten(start_dim=1, end_dim=-1)
Linear(in_features=512, out_features=10, bias=True)
""".strip().splitlines()
