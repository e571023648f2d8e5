"""The ranking: any guidance rule against the exact optimum, on problems whose answer is known (docs/ranking.md).

from companion.ranking import rank

def my_rule(step):
    return step.conditional + step.weight * step.delta.clamp(-1, 1)

print(rank(my_rule).text())
"""

from companion.ranking.problems import Problem
from companion.ranking.ranking import Ranking, find_rule, load_ranking, rank
from companion.ranking.rules.catalogue import RULES, Rule
from companion.ranking.standings import Duel, Standing, duel, standings
from companion.ranking.step import Step
from companion.ranking.suites import SITUATIONS, suite_problems
