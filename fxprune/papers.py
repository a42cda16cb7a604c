"""The papers that methods come from: one table, for ``fxprune methods --cite``, the site, ``CITATION.cff``.

A method's entry is every paper that names it in ``methods``; nothing else has to be registered.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["PAPERS", "Paper", "bibtex", "citable", "papers_of"]


@dataclass(frozen=True)
class Paper:
    """Hold what is needed to cite a paper.

    ``key``: of its BibTeX entry. ``authors``: "Family, Given and Family, Given". ``methods``: public names of
    the methods that come from it. ``venue``: proceedings or journal. ``kind``: the type of a BibTeX entry.
    Fields are "" where there is nothing to say.
    """

    key: str
    title: str
    authors: str
    year: int
    methods: tuple[str, ...]
    venue: str = ""
    kind: str = "inproceedings"
    arxiv: str = ""
    pages: str = ""
    volume: str = ""
    url: str = ""
    note: str = ""


ICLR = "International Conference on Learning Representations"
ICML = "Proceedings of the International Conference on Machine Learning"
NEURIPS = "Advances in Neural Information Processing Systems"
CVPR = "Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition"

# fmt: off
PAPERS: tuple[Paper, ...] = (
    Paper(
        "lee2019snip",
        "SNIP: Single-shot Network Pruning based on Connection Sensitivity",
        "Lee, Namhoon and Ajanthan, Thalaiyasingam and Torr, Philip H. S.",
        2019, ("snip",), ICLR, arxiv="1810.02340",
    ),
    Paper(
        "dejorge2021progressive",
        "Progressive Skeletonization: Trimming more fat from a network at initialization",
        "de Jorge, Pau and Sanyal, Amartya and Behl, Harkirat S. and Torr, Philip H. S. and "
        "Rogez, Grégory and Dokania, Puneet K.",
        2021, ("force", "iter-snip", "grasp-it"), ICLR, arxiv="2006.09081",
    ),
    Paper(
        "verdenius2020pruning",
        "Pruning via Iterative Ranking of Sensitivity Statistics",
        "Verdenius, Stijn and Stol, Maarten and Forré, Patrick",
        2020, ("iter-snip",), kind="misc", arxiv="2006.00896",
    ),
    Paper(
        "wang2020picking",
        "Picking Winning Tickets Before Training by Preserving Gradient Flow",
        "Wang, Chaoqi and Zhang, Guodong and Grosse, Roger",
        2020, ("grasp",), ICLR, arxiv="2002.07376",
    ),
    Paper(
        "tanaka2020pruning",
        "Pruning neural networks without any data by iteratively conserving synaptic flow",
        "Tanaka, Hidenori and Kunin, Daniel and Yamins, Daniel L. K. and Ganguli, Surya",
        2020, ("synflow", "npb-synflow"), NEURIPS, arxiv="2006.05467", pages="6377--6389", volume="33",
    ),
    Paper(
        "gebhart2021unified",
        "A Unified Paths Perspective for Pruning at Initialization",
        "Gebhart, Thomas and Saxena, Udit and Schrater, Paul",
        2021, ("synflow-l2",), kind="misc", arxiv="2101.10552",
    ),
    Paper(
        "cavagnero2023freerea",
        "FreeREA: Training-Free Evolution-based Architecture Search",
        "Cavagnero, Niccolò and Robbiano, Luca and Caputo, Barbara and Averta, Giuseppe",
        2023, ("logsynflow",),
        "Proceedings of the IEEE/CVF Winter Conference on Applications of Computer Vision",
        arxiv="2207.05135",
    ),
    Paper(
        "anonymous2023understanding",
        "Understanding Pruning at Initialization: An Effective Node-Path Balancing Perspective",
        "{Anonymous}",
        2023, ("npb-synflow",), kind="misc",
        url="https://openreview.net/forum?id=nqoxB03tzi",
        note="Submission to ICLR 2023, without names of authors",
    ),
    Paper(
        "pham2023towards",
        "Towards Data-Agnostic Pruning At Initialization: What Makes a Good Sparse Mask?",
        "Pham, Hoang and Ta, The-Anh and Liu, Shiwei and Xiang, Lichuan and Le, Dung D. and Wen, "
        "Hongkai and Tran-Thanh, Long",
        2023, ("npb",), NEURIPS, volume="36",
        url="https://openreview.net/forum?id=xdOoCWCYaY",
    ),
    Paper(
        "xiang2025dpai",
        "DPaI: Differentiable Pruning at Initialization with Node-Path Balance Principle",
        "Xiang, Lichuan and Nguyen-Tri, Quan and Nguyen, Lan-Cuong and Pham, Hoang and Than, "
        "Khoat and Tran-Thanh, Long and Wen, Hongkai",
        2025, ("dpai", "balance"), ICLR,
    ),
    Paper(
        "fxprune",
        "fxprune: a compiler pass that prunes any PyTorch network, on its graph",
        "{The fxprune maintainers}",
        2026, ("balance",), kind="software",
        url="https://github.com/fxprune/fxprune",
    ),
    Paper(
        "wang2023ntksap",
        "NTK-SAP: Improving neural network pruning by aligning training dynamics",
        "Wang, Yite and Li, Dawei and Sun, Ruoyu",
        2023, ("ntk-sap",), ICLR, arxiv="2304.02840",
    ),
    Paper(
        "patil2021phew",
        "PHEW: Constructing Sparse Networks that Learn Fast and Generalize Well without Training Data",
        "Patil, Shreyas Malakarjun and Dovrolis, Constantine",
        2021, ("phew",), ICML, arxiv="2010.11354", pages="8432--8442",
    ),
    Paper(
        "alizadeh2022prospect",
        "Prospect Pruning: Finding Trainable Weights at Initialization using Meta-Gradients",
        "Alizadeh, Milad and Tailor, Shyam A. and Zintgraf, Luisa M. and van Amersfoort, Joost "
        "and Farquhar, Sebastian and Lane, Nicholas Donald and Gal, Yarin",
        2022, ("prospr",), ICLR, arxiv="2202.08132",
    ),
    Paper(
        "iurada2024finding",
        "Finding Lottery Tickets in Vision Models via Data-driven Spectral Foresight Pruning",
        "Iurada, Leonardo and Ciccone, Marco and Tommasi, Tatiana",
        2024, ("px",), CVPR, arxiv="2406.01820", pages="16142--16151",
    ),
    Paper(
        "han2015learning",
        "Learning both Weights and Connections for Efficient Neural Networks",
        "Han, Song and Pool, Jeff and Tran, John and Dally, William J.",
        2015, ("magnitude",), NEURIPS, arxiv="1506.02626", volume="28",
    ),
    Paper(
        "liu2022unreasonable",
        "The Unreasonable Effectiveness of Random Pruning: Return of the Most Naive Baseline for "
        "Sparse Training",
        "Liu, Shiwei and Chen, Tianlong and Chen, Xiaohan and Shen, Li and Mocanu, Decebal "
        "Constantin and Wang, Zhangyang and Pechenizkiy, Mykola",
        2022, ("random",), ICLR, arxiv="2202.02643",
    ),
    Paper(
        "lee2021layer",
        "Layer-adaptive Sparsity for the Magnitude-based Pruning",
        "Lee, Jaeho and Park, Sejun and Mo, Sangwoo and Ahn, Sungsoo and Shin, Jinwoo",
        2021, ("lamp",), ICLR, arxiv="2010.07611",
    ),
    Paper(
        "molchanov2019importance",
        "Importance Estimation for Neural Network Pruning",
        "Molchanov, Pavlo and Mallya, Arun and Tyree, Stephen and Frosio, Iuri and Kautz, Jan",
        2019, ("taylor",), CVPR, arxiv="1906.10771",
    ),
    Paper(
        "lecun1989optimal",
        "Optimal Brain Damage",
        "LeCun, Yann and Denker, John S. and Solla, Sara A.",
        1989, ("obd",), NEURIPS, pages="598--605", volume="2",
    ),
    Paper(
        "theis2018faster",
        "Faster gaze prediction with dense networks and Fisher pruning",
        "Theis, Lucas and Korshunova, Iryna and Tejani, Alykhan and Huszár, Ferenc",
        2018, ("obd",), kind="misc", arxiv="1801.05787",
    ),
    Paper(
        "he2019filter",
        "Filter Pruning via Geometric Median for Deep Convolutional Neural Networks Acceleration",
        "He, Yang and Liu, Ping and Wang, Ziwei and Hu, Zhilan and Yang, Yi",
        2019, ("fpgm",), CVPR, arxiv="1811.00250",
    ),
    Paper(
        "fang2023depgraph",
        "DepGraph: Towards Any Structural Pruning",
        "Fang, Gongfan and Ma, Xinyin and Song, Mingli and Mi, Michael Bi and Wang, Xinchao",
        2023, ("group-norm",), CVPR, arxiv="2301.12900",
    ),
    Paper(
        "liu2017learning",
        "Learning Efficient Convolutional Networks through Network Slimming",
        "Liu, Zhuang and Li, Jianguo and Shen, Zhiqiang and Huang, Gao and Yan, Shoumeng and "
        "Zhang, Changshui",
        2017, ("bn-scale",),
        "Proceedings of the IEEE International Conference on Computer Vision",
        arxiv="1708.06519",
    ),
    Paper(
        "sun2024simple",
        "A Simple and Effective Pruning Approach for Large Language Models",
        "Sun, Mingjie and Liu, Zhuang and Bair, Anna and Kolter, J. Zico",
        2024, ("wanda",), ICLR, arxiv="2306.11695",
    ),
    Paper(
        "frantar2023sparsegpt",
        "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
        "Frantar, Elias and Alistarh, Dan",
        2023, ("sparsegpt",), ICML, arxiv="2301.00774",
    ),
    Paper(
        "meng2024alps",
        "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models",
        "Meng, Xiang and Behdin, Kayhan and Wang, Haoyue and Mazumder, Rahul",
        2024, ("alps",), NEURIPS, arxiv="2406.07831", volume="37",
    ),
    Paper(
        "zhang2024dynamic",
        "Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs",
        "Zhang, Yuxin and Zhao, Lirui and Lin, Mingbao and Sun, Yunyun and Yao, Yiwu and "
        "Han, Xingjia and Tanner, Jared and Liu, Shiwei and Ji, Rongrong",
        2024, ("dsnot",), ICLR, arxiv="2310.08915",
    ),
    Paper(
        "frantar2022optimal",
        "Optimal Brain Compression: A Framework for Accurate Post-Training Quantization and Pruning",
        "Frantar, Elias and Singh, Sidak Pal and Alistarh, Dan",
        2022, ("obc",), NEURIPS, arxiv="2208.11580", volume="35",
    ),
    Paper(
        "zhu2017prune",
        "To prune, or not to prune: exploring the efficacy of pruning for model compression",
        "Zhu, Michael and Gupta, Suyog",
        2017, ("gmp",), kind="misc", arxiv="1710.01878",
    ),
    Paper(
        "frankle2019lottery",
        "The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks",
        "Frankle, Jonathan and Carbin, Michael",
        2019, ("imp",), ICLR, arxiv="1803.03635",
    ),
    Paper(
        "frankle2019stabilizing",
        "Stabilizing the Lottery Ticket Hypothesis",
        "Frankle, Jonathan and Dziugaite, Gintare Karolina and Roy, Daniel M. and Carbin, Michael",
        2019, ("imp",), kind="misc", arxiv="1903.01611",
    ),
    Paper(
        "evci2020rigging",
        "Rigging the Lottery: Making All Tickets Winners",
        "Evci, Utku and Gale, Trevor and Menick, Jacob and Castro, Pablo Samuel and Elsen, Erich",
        2020, ("rigl", "set"), ICML, arxiv="1911.11134", pages="2943--2952",
    ),
    Paper(
        "mocanu2018scalable",
        "Scalable training of artificial neural networks with adaptive sparse connectivity "
        "inspired by network science",
        "Mocanu, Decebal Constantin and Mocanu, Elena and Stone, Peter and Nguyen, Phuong H. and "
        "Gibescu, Madeleine and Liotta, Antonio",
        2018, ("set",),
        "Nature Communications",
        kind="article",
        arxiv="1707.04780",
        pages="2383",
        volume="9",
    ),
    Paper(
        "damadi2022amenable",
        "Amenable Sparse Network Investigator",
        "Damadi, Saeed and Nouri, Erfan and Pirsiavash, Hamed",
        2022, ("asni",), kind="misc",
        note="Preprint, University of Maryland, Baltimore County",
    ),
)
# fmt: on


def papers_of(method: str) -> list[Paper]:
    """Return the papers that a method comes from, in the order of the table; none for an unknown name.

    >>> [paper.key for paper in papers_of("iter-snip")]
    ['dejorge2021progressive', 'verdenius2020pruning']
    """
    return [paper for paper in PAPERS if method in paper.methods]


def citable() -> list[str]:
    """Return the names of all methods in the table, sorted.

    >>> {"snip", "gmp"} <= set(citable())
    True
    """
    return sorted({name for paper in PAPERS for name in paper.methods})


def bibtex(papers: Iterable[Paper]) -> str:
    """Write papers as BibTeX entries, with an empty line between them.

    >>> print(bibtex(papers_of("grasp")))
    @inproceedings{wang2020picking,
      title = {{Picking Winning Tickets Before Training by Preserving Gradient Flow}},
      author = {Wang, Chaoqi and Zhang, Guodong and Grosse, Roger},
      booktitle = {International Conference on Learning Representations},
      year = {2020},
      eprint = {2002.07376},
      archiveprefix = {arXiv},
    }
    """
    return "\n\n".join(_entry(paper) for paper in papers)


def _entry(paper: Paper) -> str:
    place = "journal" if paper.kind == "article" else "booktitle"
    fields = {
        "title": f"{{{paper.title}}}",
        "author": paper.authors,
        place: paper.venue,
        "volume": paper.volume,
        "pages": paper.pages,
        "year": str(paper.year),
        "eprint": paper.arxiv,
        "archiveprefix": "arXiv" if paper.arxiv else "",
        "url": paper.url,
        "note": paper.note,
    }
    lines = [f"  {name} = {{{value}}}," for name, value in fields.items() if value]
    return "\n".join([f"@{paper.kind}{{{paper.key},", *lines, "}"])
