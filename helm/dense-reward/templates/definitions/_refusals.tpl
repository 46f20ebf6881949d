{{/* Rules that the schema cannot express because they combine values. Each message names the key and the cure. */}}

{{- define "dense-reward.refuse" -}}
{{- include "dense-reward.refuseOtherNames" . -}}
{{- include "dense-reward.refuseCredentials" . -}}
{{- include "dense-reward.refuseImages" . -}}
{{- include "dense-reward.refuseLabels" . -}}
{{- include "dense-reward.refuseCheckpoints" . -}}
{{- include "dense-reward.refuseEngine" . -}}
{{- include "dense-reward.refuseMonitoring" . -}}
{{- include "dense-reward.refuseTrainer" . -}}
{{- include "dense-reward.refusePodSpec" . -}}
{{- if and .Values.nodeSelectorTerms (hasKey .Values.affinity "nodeAffinity") -}}
{{- fail "nodeSelectorTerms and affinity.nodeAffinity exclude each other: set only one of them" -}}
{{- end -}}
{{- range .Values.env -}}
{{- if hasPrefix "DENSE_REWARD_" (upper .name) -}}
{{- fail (printf "env: %s is a setting: put it into settings, by its name in lower case without DENSE_REWARD_" .name) -}}
{{- end -}}
{{- if has .name (list "HOME" "USER" "HF_HOME" "HF_HUB_OFFLINE" "HF_TOKEN" "REWARD_KEY") -}}
{{- fail (printf "env: %s is set by the chart: remove it" .name) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Names that other charts use for what this one calls otherwise. */}}
{{- define "dense-reward.refuseOtherNames" -}}
{{- $resources := "requestCPU, requestMemory, requestGPU, limitCPU and limitMemory" -}}
{{- $ours := dict "resources" $resources "replicas" "replicaCount" "persistence" "checkpoints.pvc" "route" "httpRoute" -}}
{{- range list "args" "command" "config" "extraArgs" -}}
{{- $_ := set $ours . "settings" -}}
{{- end -}}
{{- range list "initContainers" "volumes" "volumeMounts" "podSpec" -}}
{{- $_ := set $ours . (printf "extra%s%s" (upper (substr 0 1 .)) (substr 1 -1 .)) -}}
{{- end -}}
{{- $_ := set $ours "sidecars" "extraContainers" -}}
{{- $_ := set $ours "containerSecurityContext" "podSecurityContext: that of the containers is fixed" -}}
{{- range list "servingEngineSpec" "modelSpec" -}}
{{- $_ := set $ours . "top-level keys, which the chart's README.md lists beside those of production-stack" -}}
{{- end -}}
{{- range $name, $own := $ours -}}
{{- if hasKey $.Values $name -}}
{{- fail (printf "%s is no value of this chart: use %s" $name $own) -}}
{{- end -}}
{{- end -}}
{{- if hasKey .Values.autoscaling "enabled" -}}
{{- fail "autoscaling.enabled is no value of this chart: use autoscaling.kind: none, hpa or keda" -}}
{{- end -}}
{{- end -}}

{{/* A key in an address would be readable in a ConfigMap, in the release and in process lists. The message repeats none. */}}
{{- define "dense-reward.refuseCredentials" -}}
{{- $given := dict "checkpoints.s3.endpointUrl" .Values.checkpoints.s3.endpointUrl -}}
{{- range $name, $value := .Values.settings -}}
{{- $_ := set $given (printf "settings.%s" $name) (toJson $value) -}}
{{- end -}}
{{- range .Values.trainer.jobs -}}
{{- $_ := set $given (printf "trainer.jobs: %s: changes" .name) (toJson .changes) -}}
{{- end -}}
{{- range .Values.env -}}
{{- $_ := set $given (printf "env: %s" .name) (toString .value) -}}
{{- end -}}
{{- range $key, $value := $given -}}
{{- if regexMatch "://[^/@\"\\s]+@" $value -}}
{{- fail (printf "%s has credentials in an address, which everybody who reads the release would see: name a secret instead (engineKey, checkpoints.s3.secretName, trainer.apiKey, envFrom, or valueFrom in env)" $key) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "dense-reward.refuseImages" -}}
{{- $trainer := .Values.trainer.image -}}
{{- if and (or $trainer.tag $trainer.digest) (not $trainer.repository) -}}
{{- fail "trainer.image.repository is empty, but trainer.image.tag or trainer.image.digest is set: name the repository" -}}
{{- end -}}
{{- range $key, $tag := dict "image.tag" .Values.image.tag "trainer.image.tag" $trainer.tag -}}
{{- if eq $tag "latest" -}}
{{- fail (printf "%s: latest is not a version, and replicas that start at different times could differ: name a version" $key) -}}
{{- end -}}
{{- end -}}
{{- $c := .Values.checkpoints -}}
{{- $images := dict "checkpoints.s3.image" $c.s3.image "checkpoints.image.reference" $c.image.reference -}}
{{- range $key, $image := merge $images (dict "test.image" .Values.test.image) -}}
{{- if and $image (or (hasSuffix ":latest" $image) (not (contains ":" (last (splitList "/" $image))))) -}}
{{- fail (printf "%s: %s has no tag or the tag latest: name a version or a digest" $key $image) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "dense-reward.refuseLabels" -}}
{{- $v := .Values -}}
{{- $given := dict "commonLabels" $v.commonLabels "podLabels" $v.podLabels -}}
{{- $_ := set $given "serviceMonitor.labels" $v.serviceMonitor.labels -}}
{{- $_ := set $given "prometheusRule.labels" $v.prometheusRule.labels -}}
{{- $_ := set $given "dashboard.labels" $v.dashboard.labels -}}
{{- $own := list "name" "instance" "component" "version" "managed-by" -}}
{{- range $key, $labels := $given -}}
{{- range $label, $_ := $labels -}}
{{- if has (trimPrefix "app.kubernetes.io/" $label) (append $own "helm.sh/chart") -}}
{{- fail (printf "%s: %s is set by the chart: remove it" $key $label) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "dense-reward.refusePodSpec" -}}
{{- $v := .Values -}}
{{- $fixed := list "containers" "initContainers" "volumes" "securityContext" "hostNetwork" "hostPID" "hostIPC" "hostUsers" -}}
{{- $fixed = concat $fixed (list "automountServiceAccountToken" "enableServiceLinks" "serviceAccountName" "restartPolicy") -}}
{{- $named := list "affinity" "tolerations" "nodeSelector" "topologySpreadConstraints" "schedulerName" "imagePullSecrets" -}}
{{- $named = concat $named (list "priorityClassName" "runtimeClassName" "terminationGracePeriodSeconds") -}}
{{- range $key, $_ := $v.extraPodSpec -}}
{{- if has $key $fixed -}}
{{- fail (printf "extraPodSpec.%s is fixed by the chart: remove it; extraVolumes, extraContainers and podSecurityContext add to pods" $key) -}}
{{- end -}}
{{- if has $key $named -}}
{{- fail (printf "extraPodSpec.%s is set by the chart: use the chart's own value, as values.yaml lists it" $key) -}}
{{- end -}}
{{- end -}}
{{- if eq (toString $v.podSecurityContext.runAsUser) "0" -}}
{{- fail "podSecurityContext.runAsUser: no container runs as root: name another user, or null to let the cluster choose" -}}
{{- end -}}
{{- $own := list "tmp" "checkpoints" "shm" "pairs" "keys" "key" "engine" "tls" "ca" -}}
{{- range $v.extraVolumes -}}
{{- if has .name $own -}}
{{- fail (printf "extraVolumes: a volume of the chart is called %s: choose another name" .name) -}}
{{- end -}}
{{- end -}}
{{- if and $v.caBundle.configMapName $v.caBundle.secretName -}}
{{- fail "caBundle.configMapName and caBundle.secretName exclude each other: set only one of them" -}}
{{- end -}}
{{- range $v.imagePullSecrets -}}
{{- if and (kindIs "map" .) (not .name) -}}
{{- fail "imagePullSecrets: an entry has no name: write `- name: SECRET`, or only SECRET" -}}
{{- end -}}
{{- end -}}
{{- if and $v.httpRoute.enabled (not $v.httpRoute.parentRefs) -}}
{{- fail "httpRoute.parentRefs is empty, but httpRoute.enabled is true: name a gateway, as in `- name: GATEWAY`" -}}
{{- end -}}
{{- range $v.ingress.hosts -}}
{{- if and (kindIs "map" .) (omit . "host" "paths") -}}
{{- fail "ingress.hosts: an entry is a host name, or a mapping of host and paths" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "dense-reward.refuseCheckpoints" -}}
{{- $c := .Values.checkpoints -}}
{{- if and $c.s3.uri (not (hasPrefix "s3://" $c.s3.uri)) -}}
{{- fail (printf "checkpoints.s3.uri: %s is not s3://...; a store with the S3 API, as Google's at https://storage.googleapis.com, is s3://... with checkpoints.s3.endpointUrl; copy from other stores in extraInitContainers" $c.s3.uri) -}}
{{- end -}}
{{- if and (eq $c.source "none") (ne .Values.settings.engine "fake") -}}
{{- fail "checkpoints.source: none is only for settings.engine fake: choose pvc, s3, hub or image" -}}
{{- end -}}
{{- if and (eq $c.source "s3") (not $c.s3.uri) -}}
{{- fail "checkpoints.s3.uri is empty, but checkpoints.source is s3: set it to s3://bucket/folder" -}}
{{- end -}}
{{- if and (eq $c.source "image") (not $c.image.reference) -}}
{{- fail "checkpoints.image.reference is empty, but checkpoints.source is image: name the image and its tag or digest" -}}
{{- end -}}
{{- if and (eq $c.source "image") (semverCompare "<1.31.0-0" .Capabilities.KubeVersion.Version) -}}
{{- fail "checkpoints.source: image needs Kubernetes 1.31 or newer, with the feature ImageVolume: choose another source" -}}
{{- end -}}
{{- if eq $c.source "hub" -}}
{{- if not (and $c.hub.sft $c.hub.reference) -}}
{{- fail "checkpoints.hub.sft and checkpoints.hub.reference are required if checkpoints.source is hub: set both to a hub id" -}}
{{- end -}}
{{- if not (or $c.hub.runId .Values.settings.allow_unrelated) -}}
{{- fail "checkpoints.hub.runId is empty: set it to declare that both checkpoints are from one run, or set settings.allow_unrelated" -}}
{{- end -}}
{{- if $c.pairs -}}
{{- fail "checkpoints.pairs: checkpoints.source hub downloads only one pair: remove pairs, or choose another source" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "dense-reward.refuseEngine" -}}
{{- $s := .Values.settings -}}
{{- $gpus := int .Values.requestGPU -}}
{{- $isNamed := or $s.reference_device (not (has (toString (default "auto" $s.device)) (list "auto" "cuda"))) -}}
{{- if eq $s.engine "vllm" -}}
{{- $needed := int (default 1 $s.tensor_parallel) -}}
{{- if lt $gpus $needed -}}
{{- fail (printf "requestGPU: settings.engine vllm with tensor_parallel %d needs at least %d GPUs" $needed $needed) -}}
{{- end -}}
{{- if and $s.tensor_parallel (not $isNamed) (not (has $gpus (list $needed (mul 2 $needed | int)))) -}}
{{- fail (printf "requestGPU: with tensor_parallel %d both models share %d GPUs, or each has its own %d, but requestGPU is %d: set it to %d or %d" $needed $needed $needed $gpus $needed (mul 2 $needed | int)) -}}
{{- end -}}
{{- end -}}
{{- if and (eq $s.engine "torch") (gt $gpus 2) -}}
{{- fail (printf "requestGPU: settings.engine torch uses one GPU, or one for each model, not %d: set replicaCount to use more, or settings.engine vllm for models that need more" $gpus) -}}
{{- end -}}
{{- if and $gpus (eq (toString $s.device) "cpu") -}}
{{- fail "settings.device: cpu leaves the GPUs of requestGPU unused: remove it, or set requestGPU to 0" -}}
{{- end -}}
{{- if and (not $gpus) (or (hasPrefix "cuda" (toString $s.device)) (hasPrefix "cuda" (toString $s.reference_device))) -}}
{{- fail "settings.device: cuda needs a GPU: set requestGPU" -}}
{{- end -}}
{{- if eq $s.engine "remote" -}}
{{- if not (and $s.sft_url $s.reference_url) -}}
{{- fail "settings.sft_url and settings.reference_url are required if settings.engine is remote: set both" -}}
{{- end -}}
{{- if .Values.checkpoints.pairs -}}
{{- fail "checkpoints.pairs: settings.engine remote serves only one pair: remove pairs" -}}
{{- end -}}
{{- end -}}
{{- if and (has $s.engine (list "remote" "fake")) .Values.requestGPU -}}
{{- fail (printf "requestGPU: settings.engine %s does not use a GPU: set requestGPU to 0" $s.engine) -}}
{{- end -}}
{{- if has $s.engine (list "vllm" "remote") -}}
{{- range $name := list "deterministic" "head_dtype" "norm_dtype" -}}
{{- if get $s $name -}}
{{- fail (printf "settings.%s: settings.engine %s does not support it, only torch does: remove it" $name $s.engine) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and $s.isolate_keys (not .Values.apiKeys.secretName) -}}
{{- fail "settings.isolate_keys has no effect without API keys: set apiKeys.secretName" -}}
{{- end -}}
{{- end -}}

{{- define "dense-reward.refuseMonitoring" -}}
{{- $m := .Values.serviceMonitor -}}
{{- if and $m.enabled .Values.apiKeys.secretName (not (or $m.secretName .Values.settings.open_metrics)) -}}
{{- fail "serviceMonitor.secretName is empty, but with apiKeys Prometheus needs a key too: set it, or settings.open_metrics" -}}
{{- end -}}
{{- $a := .Values.autoscaling -}}
{{- if and (eq $a.kind "keda") (not $a.keda.serverAddress) -}}
{{- fail "autoscaling.keda.serverAddress is empty, but autoscaling.kind is keda: set it, for example to http://prometheus:9090" -}}
{{- end -}}
{{- $isAsked := or (eq $a.kind "hpa") (and (eq $a.kind "keda") (not $a.keda.query)) -}}
{{- if and $isAsked (not $m.enabled) -}}
{{- $cure := ternary ", or set your own query in autoscaling.keda.query" "" (eq $a.kind "keda") -}}
{{- fail (printf "autoscaling.kind %s needs the series that a ServiceMonitor scrapes: enable serviceMonitor%s" $a.kind $cure) -}}
{{- end -}}
{{- if gt (int $a.minReplicaCount) (int $a.maxReplicaCount) -}}
{{- fail (printf "autoscaling.minReplicaCount is above autoscaling.maxReplicaCount: %d > %d" (int $a.minReplicaCount) (int $a.maxReplicaCount)) -}}
{{- end -}}
{{- end -}}

{{- define "dense-reward.refuseTrainer" -}}
{{- $t := .Values.trainer -}}
{{- if ne $t.kind "none" -}}
{{- if not $t.jobs -}}
{{- fail (printf "trainer.jobs is empty, but trainer.kind is %s: list a job, or set trainer.kind to none" $t.kind) -}}
{{- end -}}
{{- if ne .Values.checkpoints.source "pvc" -}}
{{- fail (printf "trainer.kind: the trainer writes to a claim, but checkpoints.source is %s: set it to pvc" .Values.checkpoints.source) -}}
{{- end -}}
{{- $names := list -}}
{{- range $t.jobs -}}
{{- $launches := or (eq .job "sft") (and (eq .job "dpr") (has "engine=trl" .changes)) -}}
{{- if and (gt (int .requestGPU) 1) (not $launches) -}}
{{- fail (printf "trainer.jobs: %s runs in one process: set requestGPU of %s to 1%s" .job .name (ternary ", or add engine=trl to its changes" "" (eq .job "dpr"))) -}}
{{- end -}}
{{- if and $.Values.apiKeys.secretName (not $t.apiKey.secretName) (has .job (list "dpr" "gradient" "credit" "evaluate")) -}}
{{- fail (printf "trainer.apiKey.secretName is empty, but with apiKeys the job %s needs a key too: name its secret" .name) -}}
{{- end -}}
{{- $names = append $names .name -}}
{{- end -}}
{{- if ne (len $names) (len (uniq $names)) -}}
{{- fail (printf "trainer.jobs: two jobs have the same name: %s" (join ", " $names)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
