"""Graphs of different sizes with PyTorch Geometric, whose batches are one large graph."""

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torch_geometric.data import Batch, Data
from torch_geometric.nn import GCNConv, global_mean_pool

from ksuit_runner import SgdTrainer


class Rings(Dataset[Data]):
    """Rings of 5 to 12 nodes with a noisy feature, some of which are cut open; which ones is to be found.

    A sample has features ``x`` of shape (nodes, 2), the degree less 2 and noise, edges ``edge_index`` of shape
    (2, edges) and the class ``y`` of shape (1,): 1 for a ring that is cut open.

    Args:
        size: Number of graphs.
        seed: Seed of the generator that makes them.
    """

    output_shape = (2,)

    def __init__(self, size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.graphs = []
        for number in range(size):
            nodes = int(torch.randint(5, 13, (), generator=generator))
            first = torch.arange(nodes - number % 2)
            ends = torch.stack([first, (first + 1) % nodes])
            edges = torch.cat([ends, ends.flip(0)], dim=1)
            degree = torch.bincount(edges[0], minlength=nodes).float()
            noise = 0.1 * torch.randn(nodes, generator=generator)
            self.graphs.append(Data(torch.stack([degree - 2, noise], 1), edges, y=torch.tensor([number % 2])))

    def __len__(self) -> int:
        return len(self.graphs)

    def __getitem__(self, index: int) -> Data:
        return self.graphs[index]


class GraphNet(nn.Module):
    """Two graph convolutions (Kipf and Welling, ICLR 2017, arXiv:1609.02907), and the mean over the nodes of a graph.

    Args:
        output_shape: (classes,), from the data.
        width: Width of the layers.
    """

    def __init__(self, output_shape: tuple[int, ...], width: int = 16) -> None:
        super().__init__()
        self.first, self.second = GCNConv(2, width), GCNConv(width, width)
        self.head = nn.Linear(width, output_shape[0])

    def forward(self, graphs: Batch) -> Tensor:
        """Return scores of shape (graphs, classes)."""
        hidden = self.first(graphs.x, graphs.edge_index).relu()
        hidden = self.second(hidden, graphs.edge_index).relu()
        scores: Tensor = self.head(global_mean_pool(hidden, graphs.batch))
        return scores


class GraphTrainer(SgdTrainer):
    """Knows what PyTorch Geometric's batches consist of."""

    def inputs_and_targets(self, batch: Batch) -> tuple[Batch, Tensor]:
        """Return the graphs and their classes, of shape (graphs,)."""
        return batch, batch.y

    def batch_size(self, batch: Batch) -> int:
        """Return the number of graphs; the tensors of a batch have one row per node."""
        return int(batch.num_graphs)
