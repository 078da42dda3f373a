"""Print 11,000 questions and answers as conversations: sums of two numbers below 100, and words to reverse.

python tests/make_questions.py > questions.jsonl
"""

import json
import random

random.seed(0)
pairs = [(f"{a}+{b}", str(a + b)) for a in range(100) for b in range(100)]
pairs = random.sample(pairs, 7000)
words = set()
while len(words) < 4000:
    words.add("".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=random.randint(3, 5))))
pairs += [(f"reverse {word}", word[::-1]) for word in sorted(words)]
random.shuffle(pairs)
for question, answer in pairs:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    print(json.dumps({"messages": messages}))
