{{/* Parts that all pods of the chart share. */}}

{{/* What is fixed overrides podSecurityContext, which overrides securityContext. */}}
{{- define "dense-reward.podSecurity" -}}
{{- $security := dict -}}
{{- with .Values.securityContext.runAsUser -}}
{{- $security = dict "runAsUser" (int64 .) "runAsGroup" (int64 .) -}}
{{- end -}}
{{- with .Values.securityContext.fsGroup -}}
{{- $security = merge (dict "fsGroup" (int64 .) "fsGroupChangePolicy" "OnRootMismatch") $security -}}
{{- end -}}
{{- $fixed := dict "runAsNonRoot" true "seccompProfile" (dict "type" "RuntimeDefault") -}}
{{- toYaml (mergeOverwrite $security (deepCopy .Values.podSecurityContext) $fixed) -}}
{{- end -}}

{{- define "dense-reward.containerSecurity" -}}
allowPrivilegeEscalation: false
capabilities:
  drop: [ALL]
privileged: false
readOnlyRootFilesystem: true
runAsNonRoot: true
{{- end -}}

{{/* Without enableServiceLinks: false Kubernetes sets DENSE_REWARD_SERVICE_HOST and others, which the service refuses. */}}
{{- define "dense-reward.podCommon" -}}
automountServiceAccountToken: false
enableServiceLinks: false
serviceAccountName: {{ include "dense-reward.serviceAccountName" . | quote }}
securityContext:
  {{- include "dense-reward.podSecurity" . | nindent 2 }}
{{- with concat .Values.imagePullSecrets (dig "imagePullSecrets" list (default dict .Values.global)) }}
imagePullSecrets:
  {{- range . }}
  - name: {{ kindIs "map" . | ternary . (dict "name" .) | dig "name" "" | quote }}
  {{- end }}
{{- end }}
{{- end -}}

{{- define "dense-reward.placement" -}}
{{- with .Values.extraPodSpec }}
{{- toYaml . }}
{{- end }}
{{- with .Values.schedulerName }}
schedulerName: {{ . | quote }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- with .Values.runtimeClassName }}
runtimeClassName: {{ . | quote }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- $affinity := deepCopy .Values.affinity }}
{{- with .Values.nodeSelectorTerms }}
{{- $required := dict "nodeSelectorTerms" . }}
{{- $_ := set $affinity "nodeAffinity" (dict "requiredDuringSchedulingIgnoredDuringExecution" $required) }}
{{- end }}
{{- with $affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Arguments: gpu, gpuType, cpu, memory, disk, limitCPU, limitMemory. */}}
{{- define "dense-reward.resources" -}}
requests:
  cpu: {{ .cpu | quote }}
  memory: {{ .memory | quote }}
  {{- with .disk }}
  ephemeral-storage: {{ . | quote }}
  {{- end }}
  {{- if .gpu }}
  {{ .gpuType }}: {{ int .gpu }}
  {{- end }}
limits:
  memory: {{ default .memory .limitMemory | quote }}
  {{- with .limitCPU }}
  cpu: {{ . | quote }}
  {{- end }}
  {{- if .gpu }}
  {{ .gpuType }}: {{ int .gpu }}
  {{- end }}
{{- end -}}

{{/* Libraries need a home folder and a user name: the root is read-only, and the user can be missing in /etc/passwd. */}}
{{- define "dense-reward.homeEnv" -}}
- name: HOME
  value: /tmp
- name: USER
  value: dense-reward
{{- end -}}

{{/* Programs that read certificates find the bundle by one of these names. */}}
{{- define "dense-reward.givenEnv" -}}
{{- if include "dense-reward.caVolume" . }}
{{- range list "SSL_CERT_FILE" "REQUESTS_CA_BUNDLE" "AWS_CA_BUNDLE" "OTEL_EXPORTER_OTLP_CERTIFICATE" }}
- name: {{ . }}
  value: {{ printf "/etc/dense-reward/ca/%s" $.Values.caBundle.key | quote }}
{{- end }}
{{- end }}
{{- with .Values.env }}
{{ toYaml . }}
{{- end -}}
{{- end -}}

{{- define "dense-reward.caVolume" -}}
{{- with .Values.caBundle -}}
{{- if .configMapName -}}
- name: ca
  configMap:
    name: {{ .configMapName | quote }}
{{- else if .secretName -}}
- name: ca
  secret:
    secretName: {{ .secretName | quote }}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "dense-reward.caMount" -}}
{{- if include "dense-reward.caVolume" . -}}
- name: ca
  mountPath: /etc/dense-reward/ca
  readOnly: true
{{- end -}}
{{- end -}}

{{- define "dense-reward.tmpVolume" -}}
- name: tmp
  emptyDir:
    sizeLimit: {{ .Values.tmpSize | quote }}
{{- end -}}

{{- define "dense-reward.shmVolume" -}}
- name: shm
  emptyDir:
    medium: Memory
    sizeLimit: {{ .Values.shmSize | quote }}
{{- end -}}

{{- define "dense-reward.extra" -}}
{{- with . }}
{{- toYaml . }}
{{- end }}
{{- end -}}
