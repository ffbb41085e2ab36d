"""Adapting a segmentation network to unlabelled target images, in stages.

Stages train a source actor, a style-tuned actor, a corrector and reward nets, and improve the actor on target
images against the reward; a loop does them one after the other and never twice. A method says which stages
there are and what they are made of; everything here works on images ``(N, C, *S)`` of any number of spatial
dimensions and knows no method.

=================== ========================================================================================
`actors`            policies and critics around any network that gives logits
`rewards`           oracles and learned rewards of label maps by registry key, and `Judge`
`sets`              images of both domains, and the draws of a step
`parts`             networks by key, parts of checkpoints, rules and styles of a config
`stages`, `loop`    which stages there are; doing them on all ranks, each once
`fitting`           the loop of every stage that goes down a gradient
`supervised`        cross-entropy on source labels
`pairing`           who writes the pairs of a reward net
`correcting`        measuring a corrector
`rewarding`         measuring and calibrating a reward net
`players`           policy, reference and critic of one iteration, and their update
`watching`          what is measured without labels, and the alarms
`pseudo_labels`     plausible predictions as actions
`schedules`         learning rates
=================== ========================================================================================
"""
