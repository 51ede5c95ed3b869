"""Golds and answers as people have them, and the reward that a person would give."""

import json
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from tokengrain.rewards import answers
from tokengrain.rewards.answers import boxed, gold_number, math_equal, number_of, numbers_in, readable
from tokengrain.rewards.builtin import make_reward
from tokengrain.rewards.suite import RewardError, RewardFailure

SHARED = Path(__file__).parents[3] / "shared"

RIGHT = r"""
11/2 | 5.5
10/3 | \frac{10}{3}
3 1/2 | 3.5
The answer is 12. | 12
We have $x=3$, so it is $\boxed{12}$. | 12
7:30 | 7:30 \text{ p.m.}
-\frac{1}{2} | -0.5
-\frac{1}{2} | \frac{-1}{2}
\frac{-1}{2} | -\frac12
25\% | 25\%
25\% | 25
25\% | 0.25
12.5 | 12.5\%
\$1,250.50 | 1250.50
\$1,250.50 | 1250.5
1250.5 | \$1,250.50
$36 | 36
15 | 15\text{ cm}
15\mbox{ cm}^2 | 15
864 \mbox{ inches}^2 | 864
15 | 15 \text{ cm}^2
15 | 15 km/h
60 | 60^\circ
60^\circ | 60
60^\circ | 60 \text{ degrees}
60 degrees | 60^{\circ}
6.02 \times 10^{23} | 6.02 \times 10^{23}
6.02e23 | 6.02 \times 10^{23}
0.001 | 10^{-3}
10^{-3} | 0.001
2^{10} | 1024
1024 | 2^{10}
\{1,2,3\} | \{3,2,1\}
(0,9) \cup (9,36) | (0,9)\cup(9,36)
x^2+2x+1 | 1+2x+x^2
(a+5)(b+2) | (b+2)(a+5)
(a+5)(b+2) | ab+2a+5b+10
y = 2x + 3 | y=3+2x
x=5 | 5
x=5 | x = 5
5x - 7y + 11z + 4 = 0 | 5x-7y+11z+4=0
\frac{\sqrt{3}}{3} | \frac{1}{\sqrt{3}}
2\sqrt{3} | \sqrt{12}
\sqrt[3]{2} | 2^{1/3}
6 - 5i | 6-5i
6 - 5i | -5i+6
1 \pm \sqrt{19} | 1+\sqrt{19}, 1-\sqrt{19}
4210_{5} | 4210_5
101_2 | 101_2
2:3 | 2:3
2:3 | 2 : 3
3:30 | 3:30
E | \text{E}
E | \mathrm{(E)}
C | C)
C | C. 42
C | (C)\ 42
\text{(C)} | C
Navin | \text{Navin}
True | \text{True}
no | \text{No}
Yes | \textbf{Yes}
\text{east} | East
ellipse | \text{an ellipse}
\text{red and blue} | \text{blue and red}
no solution | \text{no solution}
\emptyset | \varnothing
\infty | \infty
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} | \begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}
\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix} | \begin{pmatrix} 0.2 \\ -3.6 \end{pmatrix}
1\frac{4}{5} | \frac{9}{5}
1\frac{4}{5} | 1.8
1 4/5 | 9/5
137 \frac{1}{2} | 137.5
5 | \$5
5 | 5.00
5 | +5
5 | \text{5}
5 | \mathbf{5}
5 | 5\,
5 | \frac{10}{2}
5 | \frac{5}{1}
0 | -0
0.5 | 1/2
.5 | 0.5
1/2 | \frac{2}{4}
\frac43 | \frac{4}{3}
\frac 59 | 5/9
(3, 4) | \left(3, 4\right)
(6,31,-1) | (6, 31, -1)
3 or 4 | 4 or 3
x=1,x=2 | 1,2
2x+3 | 2x+3
2k | 2k
\cot x | \frac{1}{\tan x}
sqrt(2) | \sqrt{2}
2*sqrt(3) | 2\sqrt{3}
pi/6 | \frac{\pi}{6}
x**2+1 | x^2+1
3*x+2 | 3x+2
x \ge 3 | [3,\infty)
[3,\infty) | x \geq 3
-1<x<6 | (-1,6)
(-1,6) | -1 < x < 6
007 | 007
033 | 33
33 | 33.
1,234 | 1234
1234 | 1,234
1234 | 1 234
58,500 | 58500
3,500 | 3500
12 \text{ hours} | 12
12 hours | 12
100 \text{ m/s} | 100
5 apples | 5
\frac{270}7\text{ degrees} | \frac{270}{7}
.0000672 | 0.0000672
.0000672 | 6.72 \times 10^{-5}
n = 7 | 7
7 | n = 7
(x,y) = (3,4) | (3,4)
−5 | -5
3! | 6
6 | 3!
\frac{1}{2} | 50\%
1 | 100\%
\{x \mid x > 2\} | (2, \infty)
\{x : -1 \le x < 4\} | [-1,4)
(-\infty,-2)\cup(2,\infty) | x<-2 \text{ or } x>2
x \le -2 \text{ or } x \ge 2 | (-\infty,-2] \cup [2,\infty)
$2.5 million | 2500000
2.5 million | 2.5
1.2 \text{ billion} | 1200000000
3 x 10^8 | 300000000
\textbf{(C)}\ 12 | C
\textbf{(C)}\ 12 | 12
(A) \frac{1}{2} | 0.5
3:30 p.m. | 3{:}30\text{ PM}
1/3 | 0.\overline{3}
0.\overline{12} | \frac{4}{33}
0.1\overline{6} | \frac16
5 cm | 5\text{ centimeters}
100000 | 1,00,000
1,23,45,678 | 12345678
1,12,123 | 1, 12, 123
1000 | 1'000
5 | 5 €
¥500 | 500
5元 | 5
5 | 5个
5 mètres | 5
7^{th} | 7
7 | 7^{\text{th}}
infinity | \infty
-\infty | -infinity
2√3 | 2\sqrt{3}
x¹⁰ | x^{10}
3 × 10⁻⁵ | 0.00003
6x^2 | 2x\cdot3x
3x^2y | 3yx^2
2xy | xy+xy
2pi | 2\pi
3x^2 | 3x^2
\frac{1}{2}bh | \frac12bh
1200 | €1,200
1200 | £1,200
1200 | \text{€}1,200
90 | 90^\circ C
5 | \boldsymbol{5}
25 | 25 = n
18 | Rs 18
18 | \text{\$}18
3, 5, 7 | 3, 5, \text{ and } 7
1,000, 2,000 | 1000, 2000
5 | \text{The answer is 5}
5 | \text{Answer: 5}
\mathbb{R} | \mathbb R
5 | 5km/h
5 | 5 miles per hour
5 | 5 ft.
5 | 5 p.m.
5 | 5th
5 | 5 square cm
5 | 5cats
5 | 5 кг
5 | 5 m/s^2
5 | 5 units^2
5 | (5)
5 | \approx 5
5 | 5^\circ\text{C}
5 | 5°F
5 | 5 apples a day
12 | 12 dollars
12 | 12 days
12 | 12 am
B | \text{B is the correct answer}
"""
WRONG = r"""
31/2 | 3.5
10/3 | 1
We have $x=3$, so it is $\boxed{12}$. | 3
7:30 a.m. | 7:30 pm
-\frac{1}{2} | \frac{1}{2}
25\% | 52\%
\$36 | \$63
15\text{ cm} | 16\text{ cm}
60^\circ | 30^\circ
6.02e23 | 6.02 \times 10^{22}
10^{-3} | 10^{-4}
\{1,2,3\} | \{1,2\}
\{1,2\} | \{1,2,3\}
(0,9) \cup (9,36) | (0,36)
6r^2-4r-24 | 6r^2-4r+24
x=5 | y=6
5x - 7y + 11z + 4 = 0 | 5x-7y+11z-4=0
\sqrt[3]{2} | \sqrt{2}
6 - 5i | 6+5i
1 \pm \sqrt{19} | 1+\sqrt{19}
1 \pm \sqrt{19} | 1 \pm \sqrt{18}
4210_{5} | 4210_{6}
4210_5 | 5
204_5 | 402_5
2:3 | 3:2
3:30 | 4:30
2:3 | 3
E | A
\text{(C)} | \text{(E)}
A | B
D | A, D
A | A or B
Navin | Evelyn
True | False
east | west
No | on
\infty | -\infty
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} | \begin{pmatrix} 1 & 3 \\ 2 & 4 \end{pmatrix}
1\frac{4}{5} | \frac{4}{5}
\pi | 3.14
\pi | \frac{22}{7}
e^2 | 7.389
\frac{1}{3} | 0.33
0.3333 | \frac{1}{3}
5 | 5.01
3,14 | 3.14
(3, 4) | [3,4]
(1,2) | (1,2,3)
(6,31,-1) | (6,31,1)
2 | 1, 2
2 | 2 or 3
\frac{1}{100!} | \frac{1}{101!}
10^{-20} | 10^{-21}
1e-8 | 2e-8
0.00001 | 0.00002
100000000 | 100000001
2x+3 | 2x
2k | 2
2 | 2k
3x | 3
7\pi | 7
7 | 7\pi
\log 2 | \log 3
\ln 2 | \ln 3
\sin x | \cos x
x > 3 | [3,\infty)
(-1,6) | (-1,6]
1234 | 1,23,4
3, 500 | 3500
12 hours | 13 hours
.0000672 | 0.0000673
\frac{2}{3} | \frac{3}{2}
-5 | 5
5 | -5
\sqrt{51} | 51
51 | \sqrt{51}
2^{8} | 8
8 | 2^8
5 kg | 5 g
5\text{ cm} | 5\text{ mm}
2.5 million | 2.5 billion
x \le -2 \text{ or } x \ge 2 | x \ge 2
(-\infty,-2)\cup(2,\infty) | x \le -2 \text{ or } x>2
\{x \mid x > 2\} | [2, \infty)
\textbf{(C)}\ 12 | B
\textbf{(C)}\ 12 | 13
1/3 | 0.3
0.\overline{12} | 0.12
100000 | 2,00,000
0 | 1,00,000
-infinity | infinity
\infty | -Infinity
5\alpha | 5
2 | 2х
3x^2 | 3
3x^2 | 3x^3
-3x^2 | -3x^4
3 | 3x^2
2xy | 2
2xy | 2ab
8xy | 8yz
6ab | 6ac
6ab^2 | 6ab
5x-y | 5
\frac{1}{2}bh | \frac12
2 sin x | 2 cos x
5 | 5 x
A | A) or B)
A | A: \text{or } B
5xyz | 5
2A | 2
4abc | 4
3t | 3
3 | 3t
"""
# Golds and completions in which nothing, or something else than a box, marks the answer.
TEXTS = [
    # Clauses are no answers; another form of the same digits is another answer.
    ("14", "The answer is that after 3 days, she will have 14 apples.", 1),
    ("14", "Answer: He buys 2 packs, it costs $14.", 1),
    ("7", "Answer: In week 7, he ran 20 miles.", 0),
    ("3", "Answer: After 3 days, she has 14 apples left.", 0),
    ("1,-1,i,-i", "The answer is $1, i, -1, -i$.", 1),
    ("i,2", "Answer: 2, i", 1),
    ("14", "Answer: After a while, it takes 14 minutes.", 1),
    ("3-5", "The answer is 3/5.", 0),
    ("3-5", "The answer is 3+5.", 0),
    ("3-5", "So it is $\\boxed{3,5}$.", 0),
    ("3-5", "So it is $\\boxed{\\frac{3}{5}}$.", 0),
    ("3-5", "So it is $\\boxed{" + "3" * 5000 + "}$.", 0),
    ("2024-05-01", "So it is $\\boxed{2024-5-1}$.", 1),
    ("9 d", "Answer: 9 days", 1),
    ("60 minutes", "The answer is 60 m.", 1),
    # What is said not to be the answer; signs in words; ranges, dates, telephones; units; points of thousands.
    ("4", "The answer is 5, not 4.", 0),
    ("5", "The answer is 5, not 4.", 1),
    ("5", "The answer is 5 (not 4).", 1),
    ("4", "The answer is 5 (not 4).", 0),
    ("4", "The answer is 5 rather than 4.", 0),
    ("5", "The answer is 5 instead of 4.", 1),
    ("5", "The answer isn't 5.", 0),
    ("B", "The answer is B, not C.", 1),
    ("C", "The answer is B, not C.", 0),
    ("5", "The answer is minus 5.", 0),
    ("-5", "The answer is minus 5.", 1),
    ("-5", "So it is $\\boxed{\\text{minus }5}$.", 1),
    ("5", "So it is $\\boxed{\\text{minus }5}$.", 0),
    ("5", "10 minus 5 is 5.", 1),
    ("-5", "The answer is negative 5.", 1),
    ("10-20", "So it is $\\boxed{-10}$.", 0),
    ("10-20", "So it is $\\boxed{10-20}$.", 1),
    ("10-20", "So it is $\\boxed{10\\text{ to }20}$.", 1),
    ("10-20", "So it is $\\boxed{10–20}$.", 1),
    ("1-2", "So it is $\\boxed{-1}$.", 0),
    ("555-1234", "So it is $\\boxed{-679}$.", 0),
    ("555-1234", "So it is $\\boxed{555-1234}$.", 1),
    ("2024-05-01", "So it is $\\boxed{2018}$.", 0),
    ("2024-05-01", "So it is $\\boxed{2024-05-01}$.", 1),
    ("05/01/2024", "So it is $\\boxed{5/2024}$.", 0),
    ("5 hours", "So it is $\\boxed{5\\text{ minutes}}$.", 0),
    ("5 hours", "So it is $\\boxed{5\\text{ h}}$.", 1),
    ("5 miles", "So it is $\\boxed{5\\text{ km}}$.", 0),
    ("20 °C", "The answer is 20 °F.", 0),
    ("20 °C", "The answer is 20 °C.", 1),
    ("20 °C", "So it is $\\boxed{20^\\circ \\text{C}}$.", 1),
    ("20 °C", "So it is $\\boxed{20^\\circ}$.", 1),
    ("10 dollars", "So it is $\\boxed{10\\text{ cents}}$.", 0),
    ("5 cm^2", "So it is $\\boxed{5 cm^3}$.", 0),
    ("5 cm^2", "So it is $\\boxed{5\\text{ cm}^2}$.", 1),
    ("5 cm^2", "So it is $\\boxed{5\\text{ square cm}}$.", 1),
    ("5 cm^2", "So it is $\\boxed{5\\text{ sq. cm}}$.", 1),
    ("5\\text{ ft}^2", "So it is $\\boxed{5\\text{ square feet}}$.", 1),
    ("5 cm^2", "So it is $\\boxed{5}$.", 1),
    ("yes", "Answer: Yes, it does.", 1),
    ("1234567", "Die Antwort ist: 1.234.567", 1),
    ("1234567", "So it is $\\boxed{1.234.567}$.", 1),
    ("1234567", "La respuesta es 1.234.567.", 1),
    ("not a function", "The answer is: not a function.", 1),
    ("5", "x is not 4, so the answer is 5.", 1),
    ("5", "The answer is not 4 but 5.", 1),
    ("2", "So it is $\\boxed{2}$.", 1),
    ("7", "Since 2 is not 3, we get x = 7", 1),
    ("x", "x is not 4x.", 0),
    ("8", "<think>so \\boxed{9}</think>\n\n**8**", 1),
    ("9", "<think>so \\boxed{9}</think>\n\n**8**", 0),
    ("9", "<think>so \\boxed{9}</think>\n\nDone.", 1),
    ("E", "The correct choice is **E**.", 1),
    ("5", "#### 5", 1),
    ("5", "#### 6", 0),
    ("reason 1+1\n#### 5", "so \\boxed{5}", 1),
    ("reason\n#### 1,000", "so \\boxed{1000}", 1),
    ("5", "The answer is 5.", 1),
    ("5", "The answer is 6.", 0),
    ("5", "Answer: 5", 1),
    ("B", "The answer is (B).", 1),
    ("B", "The answer is C.", 0),
    ("B", "Answer: B", 1),
    ("Evelyn", "The answer is Evelyn.", 1),
    ("Evelyn", "The answer is Carla.", 0),
    ("5", "$$5$$", 1),
    ("5", "\\[5\\]", 1),
    ("5", "\\(5\\)", 1),
    ("5", "**Answer:** 5", 1),
    ("5", "\\boxed{4} no wait \\boxed{5}", 1),
    ("5", "\\boxed{5} no wait \\boxed{4}", 0),
    ("\\frac{1}{2}", "\\boxed{\\frac{1}{2}}", 1),
    ("\\frac{1}{2}", "\\boxed{\\frac{1}{2}", 0),
    ("5", "\\boxed{ 5 }", 1),
    ("5", "\\boxed{\\boxed{5}}", 1),
    ("5", "I do not know", 0),
    ("5", "   ", 0),
    ("5", "\\boxed{?}", 0),
    ("\\frac{1}{2}", "The answer is $\\frac{1}{2}$.", 1),
    ("x^2", "The answer is $x^2$", 1),
    ("x^2", "The answer is $x^3$", 0),
    ("$\\boxed{3}$", "so \\boxed{4}", 0),
    ("$\\boxed{3}$", "so \\boxed{3}", 1),
    ("$5$", "\\boxed{5}", 1),
    ("\\(5\\)", "\\boxed{5}", 1),
    ("3", "so \\boxed{3}\n\nTherefore the answer is \\boxed{3}.", 1),
    ("-3", "The answer is $-3$", 1),
    ("1/2", "Answer: 1/2", 1),
    ("1/2", "Final answer: \\frac{1}{2}", 1),
    ("12", "It takes 12 hours", 1),
    ("$x^2+2x+1$", "$(x+1)^2$", 1),
    ("3", "\\fbox{\\frac{6}{2}}", 1),
    ("3", "\\boxed3", 1),
    ("\\frac12", "\\boxed\\frac12", 1),
    ("5", "**", 0),
    ("5", "<think>4</think><answer>5</answer>", 1),
    ("5", "<think>5</think><answer>4</answer>", 0),
    ("x^2+1", "<answer>1+x^2</answer>", 1),
    ("\\frac{1}{2}", "<answer> The answer is $\\boxed{0.5}$. </answer>", 1),
    ("5", "<answer>4</answer> or <answer>5</answer>", 1),
    ("B", "I choose option B", 1),
    ("B", "So I pick option A", 0),
    ("C", "**(C)** 12", 1),
    ("B", "The answer is B, because A is wrong.", 1),
    ("A", "The answer is B, because A is wrong.", 0),
    ("1,2", "The roots are $\\boxed{1}$ and $\\boxed{2}$.", 1),
    ("\\{1,2,3\\}", "$\\boxed{1}, \\boxed{2},\\text{ and }\\boxed{3}$", 1),
    ("2", "\\boxed{1} or \\boxed{2}", 0),
    ("2", "\\boxed{2}, \\boxed{2}", 1),
    ("2", "\\boxed{1}\n\n\\boxed{2}", 1),
    ("5", "所以答案是5。", 1),
    ("5", "答案：**6**", 0),
    ("B", "Die Antwort ist B.", 1),
    ("B", "La réponse est B.", 1),
    ("5", "The answer is 5. We used $7$ bags.", 1),
    ("7", "The answer is 5. We used $7$ bags.", 0),
    ("10", "The answer is 5. Check: 5*2=10.", 0),
    ("5", "The answer is 5. Check: 5*2=10.", 1),
    ("7", "Answer: 5\n\n$7$ is not a solution.", 0),
    ("5", "Answer: 5\n\n$7$ is not a solution.", 1),
    ("A", "<think>\\boxed{A}</think>\n\nB", 0),
    ("B", "<think>\\boxed{A}</think>\n\nB", 1),
    ("B", "<think>The answer is A</think> B", 1),
    ("A", "<think>The answer is A</think> B", 0),
    ("Paris", "<think>Answer: London</think>Paris", 1),
    ("London", "<think>Answer: London</think>Paris", 0),
    ("x", "<think>\\boxed{x}</think>$y$", 0),
    ("B", "<think>\\boxed{A}</think> **B**", 1),
    ("A", "<think>\\boxed{A}</think> (B)", 0),
    ("A", "<think>\\boxed{A}</think> Done.", 1),
    ("A", "The answer is (A) and (B).", 0),
    ("A", "Answer: A. B. C. D.", 0),
    ("A", "A) 3\nB) 4\nC) 5", 0),
    ("A", "(A) is false, (B) is true.", 0),
    ("B", "Answer: B) or C)", 0),
    ("B", "Option B is correct.", 1),
    ("B", "B is the correct answer.", 1),
    ("A", "B is the correct answer.", 0),
    ("B", "B is correct, A is wrong.", 1),
    ("5", "\\boxed{5\\ }", 1),
    ("B", "Answer: B. Because A) is too small.", 1),
    ("5", "answer：5", 1),
    ("5", "The answer is 5 apples, since 2+3=5", 1),
    ("\\frac{1}{2}", "The answer is $\\frac{1}{2}$, so we are done.", 1),
    ("5", "The answer is below.\n\n$5$", 1),
    ("5", "The answer is:\n\n$$5$$", 1),
    ("B", "The answer is B) 42 and a half", 1),
    ("B", "The answer is (B) since (A) and (C) fail", 1),
    ("A", "The answer is (B) since (A) and (C) fail", 0),
    ("C", "Answer: C) I and II", 1),
    ("2.5", "The answer is 2.5. That is it.", 1),
    ("x^2", "The answer is $x^2$. It is $x^3$ elsewhere.", 1),
    ("Evelyn", "The answer is Evelyn. She won.", 1),
    ("Evelyn", "The answer is Carla. Evelyn lost.", 0),
    ("5", "I think the answer is $x = 5$.", 1),
    ("3", "The answer is 3, as 1+2=3", 1),
    ("2", "The answer is 3, as 1+2=3", 0),
    *(
        (gold, f"{start}so \\boxed{{4}}{end}\nThe answer is 5.", int(gold == "5"))
        for gold in ("4", "5")
        for start, end in (
            *((f"<{tag}>", f"</{tag}>") for tag in ("thinking", "thought", "reasoning", "seed:think", "mm:think")),
            *(("[THINK]", "[/THINK]"), ("◁think▷", "◁/think▷"), ("<|begin_of_thought|>", "<|end_of_thought|>")),
            ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
            ("analysis", "assistantfinal"),
        )
    ),
]


def table(text):
    return [tuple(line.split(" | ")) for line in text.strip().splitlines()]


def test_answers_in_a_box():
    wrong = [pair for pair in table(RIGHT) if not math_equal([pair[0]], f"So it is $\\boxed{{{pair[1]}}}$.")]
    assert wrong == []
    wrong = [pair for pair in table(WRONG) if math_equal([pair[0]], f"So it is $\\boxed{{{pair[1]}}}$.")]
    assert wrong == []
    assert all(readable(gold) for gold, _ in table(RIGHT) + table(WRONG))


def test_answers_that_something_else_marks():
    assert [(g, c) for g, c, reward in TEXTS if bool(math_equal([g], c)) != bool(reward)] == []


def test_published_golds_against_themselves():
    path = SHARED / "data" / "math500.parquet"
    if not path.exists():
        pytest.skip("no math500.parquet in ../shared/data")
    read = pytest.importorskip("pyarrow.parquet").read_table
    for name in ("math500", "aime_2024"):
        rows = read(path.with_name(f"{name}.parquet")).to_pylist()
        golds = list(dict.fromkeys(str(row["reward_model"]["ground_truth"]) for row in rows))
        for form in ("{}", "$\\boxed{{{}}}$"):
            wrong = [g for g in golds if not math_equal([form.format(g)], f"So it is $\\boxed{{{g}}}$.")]
            assert wrong == []


def test_a_persons_rewards():
    path = SHARED / "cases" / "answers.json"
    if not path.exists():
        pytest.skip("no answers.json in ../shared/cases")
    pairs = json.loads(path.read_text())["pairs"]
    found = [bool(math_equal([p["gold"]], p["completion"])) == bool(p["reward"]) for p in pairs]
    assert [p for p, right in zip(pairs, found) if not right] == []


def test_math_reads_a_column_as_what_it_is():
    reward = make_reward("math").function
    golds = [["18", "20"], np.array(["18", "20"]), 1e-05, 1e-05, np.float64(0.5), ["Evelyn", "B"], 7]
    texts = [r"\boxed{20}", r"\boxed{19}", r"\boxed{1}", r"\boxed{0.00001}", "$1/2$", r"\boxed{\text{(B)}}", "#### 7"]
    assert reward(completions=texts, answer=golds) == [1, 0, 0, 1, 1, 1, 1]
    bad = dict(reward.unreadable(["5", "", "?!", None, ["5", "?"], "x^2", []]))
    assert sorted(bad) == [1, 2, 3, 4, 6]
    assert "understands no answer in the column 'answer': '?!'" in bad[2]
    (failure,) = reward(completions=[r"\boxed{3}"], answer=["?!"])
    assert isinstance(failure, RewardFailure)


@pytest.mark.parametrize(
    ("gold", "number"),
    [
        *((1e-05, "1/100000"), (1e16, "1e16"), (2.5e-07, "2.5e-7"), ("3e8", "3e8"), (r"\frac{3}{4}", "3/4")),
        *(
            (r"10,\!000", "10000"),
            ("1{,}000", "1000"),
            ("1 000", "1000"),
            ("-$5", "-5"),
            ("- 5", "-5"),
            ("5 1/2", "5.5"),
        ),
        *(("3:4", None), ("2k+2", None), ("(3, 4)", None), ("2k", None), ("x", None), ("", None), (None, None)),
        *((True, None), (float("nan"), None), ("1,2,3", None), ("3, 500", None), ("1e99999", None), ("1/0", None)),
        *(("11/2", "5.5"), ("10/3", "10/3"), (r"It is $\boxed{12}$, of 3.", "12"), ("2 1/3", "7/3")),
        *(("50%", "50"), ("$1,250.50", "1250.5"), ("5 apples", "5"), ("18 dollars", "18"), (r"5\text{ cm}^2", "5")),
        *(("The answer is 72.", "72"), ("it says 3 and 4", None), ("steps 1 2\n#### 72", "72"), ("#### 72 eggs", "72")),
        *((r"3 \times 10^{4}", "30000"), (r"-\dfrac12", "-1/2"), (".5", "1/2"), ("007", "7"), (r"60^\circ", "60")),
        *((np.int64(3), "3"), (np.float32(0.5), "0.5"), ("\u22125", "-5"), ("+5", "5"), ("9" * 5000, None)),
    ],
)
def test_numbers(gold, number):
    assert gold_number(gold) == (None if number is None else Fraction(number))


def test_numbers_in_a_text():
    assert numbers_in("-$5, - 6 and 3-2 (-7)") == [-5, -6, 3, 2, -7]
    assert numbers_in("1e-5 or 2,000.5 or 1/4 or 3 \u00d7 10^4") == [
        Fraction("1e-5"),
        Fraction("2000.5"),
        Fraction(1, 4),
        30000,
    ]
    assert numbers_in("6.02 \u00d7 10\u00b2\u00b3") == [602 * 10**21]
    assert numbers_in(r"\frac{3}{4} of 10{,}000") == [Fraction(3, 4), 10000]
    assert number_of("3.14.15") is None
    assert numbers_in("1,00,000 and 1\u202f000\u202f000, 1'000, 1\u2019000, 1_000; -\u20ac5") == [
        10**5,
        10**6,
        *[1000] * 3,
        -5,
    ]
    assert numbers_in("The answer is -3. It is -$5, x -3, total - 2") == [-3, -5, 3, 2]


def test_numeric():
    boxes = make_reward("numeric", style="boxed").function
    for text, gold, want in (
        (r"\boxed{\frac{3}{4}}", "3", 0),
        (r"\boxed{\frac{3}{4}}", "0.75", 1),
        (r"\boxed{10{,}000}", "10000", 1),
        (r"\boxed{3 \times 10^{4}}", "30000", 1),
        (r"\boxed{3 \times 10^{4}}", "4", 0),
        (r"\boxed{-\$5}", "-5", 1),
        (r"\boxed{\text{5 of } 12}", "12", 1),
        (r"\boxed{5", "5", 0),
        (r"\boxed{20}", ["18", "20"], 1),
        (r"\boxed{x = 5}", "5", 1),
        (r"\boxed{2 \times 9 = 18}", "18", 1),
        (r"\boxed{0.\overline{3}}", "1/3", 1),
        (r"\boxed{\$1.5 million}", "1500000", 1),
        # Several numbers, or one within something else, are not the number.
        *((rf"\boxed{{{box}}}", "2", 0) for box in ("1, 2", r"1 \text{ or } 2", "2x", "x+2", r"2\pi", "(1,2)", "1:2")),
        *((rf"\boxed{{{box}}}", "2", 0) for box in (r"\sqrt{2}", "3^2", "2x = 8")),
    ):
        assert boxes([text], answer=[gold]) == [want], (text, gold)
    last = make_reward("numeric", style="flexible").function
    assert last(["It is 5", "It is 0.00001", "It is 1e-5"], answer=[1e-05] * 3) == [0, 1, 1]
    thought = "<think>#### 4, \\boxed{4}</think>"
    assert last([f"{thought} It is 5.", f"{thought} Done."], answer=["5", "4"]) == [1, 1]
    assert boxes([f"{thought} It is 5."], answer=["4"]) == [0]
    marked = make_reward("numeric").function
    assert marked([f"{thought} It is 5.", f"{thought}\n#### 1,00,000"], answer=["4", "100000"]) == [0, 1]
    assert marked(["#### -$5", "#### -$5"], answer=["-5", "5"]) == [1, 0]
    assert marked(["#### 1 000", "#### 11/2", "#### 3 1/2"], answer=["1000", "5.5", "3.5"]) == [1, 1, 1]
    with pytest.raises(RewardError, match="the column 'answer' has no number; got '2k\\+2'"):
        marked(["#### 2"], answer=["2k+2"])
    assert dict(marked.unreadable(["1", "2k+2", ["3", "x"], 5])).keys() == {1, 2}


def test_golds_are_read_once_for_a_group():
    seen, reward = [], make_reward("numeric").function
    read = reward.gold
    reward.gold = lambda value: seen.append(value) or read(value)
    first, other = "".join(["1", "2"]), ["12", "13"]
    assert reward(["#### 12"] * 3 + ["#### 13"], answer=[first, first, other, other]) == [1, 1, 1, 1]
    assert seen == ["12", "12", "13"]
    assert reward(["#### 1", "#### 2"], answer=np.array([1.0, 2.0])) == [1, 1]


def test_several_right_answers():
    for name in ("numeric", "math"):
        reward = make_reward(name).function
        assert reward(["#### 20", "#### 19"], answer=['["18", "20"]'] * 2) == [1, 0]
        assert [place for place, _ in reward.unreadable([5.0, float("nan"), np.float32("nan"), ["5"]])] == [1, 2]
    assert make_reward("exact").function(['["a"]', "a"], answer=['["a"]'] * 2) == [1, 0], "text that is the answer"
    assert make_reward("exact").function(["a", "b", "c"], answer=[["a", "b"]] * 3) == [1, 1, 0]
    kinds = make_reward("classification", pattern=None).function
    assert kinds(["Dog", "cat"], label=[["dog", "wolf"]] * 2) == [1, 0]


def test_boxes():
    assert boxed(r"a \boxed{1} b \boxed{\frac{1}{2}} c") == r"\frac{1}{2}"
    assert boxed(r"\boxed{\{1, 2\}}") == r"\{1, 2\}"
    assert (boxed(r"\boxed{1"), boxed("1"), boxed(r"\boxed 5"), boxed(r"\fbox{5}")) == ("", None, "5", "5")


@pytest.mark.parametrize("space", ["\n", " ", "\t"])
def test_white_space_without_end_is_read_at_once(space: str) -> None:
    began = time.monotonic()
    assert answers.concluded(f"The answer is 5.\n#### 5{space * 4000}x").startswith("The answer is 5.")
    assert time.monotonic() - began < 1


def test_what_takes_long_is_not_read_without_end():
    started = time.perf_counter()
    for long in ("1" + "0" * 10**5, " " * 10**5, "1 " * 10**5, "1," * 10**5, "$" * 10**4, "a " * 10**5, "\\" * 10**5):
        assert number_of(long) is None
        assert len(numbers_in(long)) <= 10**5
    assert answers.plain("{" * 10**4) == "{" * 10**4
    assert boxed("\\boxed{" * 1000) == ""
    assert time.perf_counter() - started < 20


# The style of `numeric`, the gold, the completion, and the reward that a person would give.
NUMBERS = [
    ("last", 0.5, "It is 1/2.", 1),
    ("last", 2, "It is 1/2.", 0),
    ("last", 0.5, "It is ½.", 1),
    ("last", 3.5, "It is 3 1/2.", 1),
    ("last", 3.5, "It is 3\\frac{1}{2}.", 1),
    ("last", 0.5, "It is \\frac12.", 1),
    ("last", 0.5, "It is \\frac{1}{2}.", 1),
    ("last", 100, "is 100 m²", 1),
    ("last", 100, "is 100 cm^2", 1),
    ("last", 100, "100\\text{ cm}^2", 1),
    ("last", 2, "is 100 m²", 0),
    ("last", 8, "it is 2^3 = 8", 1),
    ("boxed", 3, "\\boxed{3x^2}", 0),
    ("boxed", 5, "\\boxed{5xy}", 0),
    ("boxed", 1200, "\\boxed{€1,200}", 1),
    ("boxed", 5, "\\boxed{\\mathbf{5}}", 1),
    ("boxed", 5, "\\boxed{\\textbf{5}}", 1),
    ("boxed", 5, "\\boxed{\\text{5 apples}}", 1),
    ("boxed", 5, "\\boxed{(5)}", 1),
    ("boxed", 5, "\\boxed{\\approx 5}", 1),
    ("boxed", 5, "\\boxed{\\boldsymbol{5}}", 1),
    ("boxed", 90, "\\boxed{90^\\circ C}", 1),
    ("boxed", 3, "\\boxed{3\\text{ or }4}", 0),
    ("boxed", 25, "\\boxed{25 = n}", 1),
    ("gsm8k", 5, "#### 5x", 0),
    ("gsm8k", 5, "#### 5x^2", 0),
    ("gsm8k", 2, "#### 2+3", 0),
    ("gsm8k", 5, "#### 5 apples", 1),
    ("gsm8k", 5, "#### $5", 1),
    ("gsm8k", 5, "#### 5 (five)", 1),
    ("gsm8k", 1200, "#### €1,200", 1),
]


def test_numbers_as_people_write_them() -> None:
    found = [
        make_reward("numeric", style=style).function(completions=[text], answer=[gold])[0]
        for style, gold, text, _ in NUMBERS
    ]
    assert [case for case, reward in zip(NUMBERS, found, strict=True) if case[-1] != reward] == []


def test_golds_that_are_numbers_with_a_unit() -> None:
    golds = {"€1,200": 1200, "5°C": 5, "-5 °C": -5, "5 men": 5, "2\\frac12": Fraction(5, 2)}
    assert {gold: gold_number(gold) for gold in golds} == golds
    assert [gold_number(gold) for gold in ("3x^2", "2xy", "2k+2", "2 sin x", "1,000, 2,000")] == [None] * 5
