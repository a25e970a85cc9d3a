"""The molecules of the generated data set: SMILES written for this project, by functional group.

All are made of H C N O F P S Cl Br, and but for the radicals closed-shell. Molecules of at most two
heavy atoms are building blocks of all others and always stay in the training split.
"""

import itertools

import numpy as np

WATER = "O"

DIATOMICS_AND_SMALL = """
[H][H] C N O F Cl Br S P [C-]#[O+] O=C=O N#N C#C C#N C=O CO CN CF CCl CBr CS CC C=C OO NO NN FF
ClCl BrBr FCl FBr ClBr SS S=C=S S=C=O OCl ON=O O[N+](=O)[O-] O=S=O O=S(=O)=O OS(=O)(=O)O
OP(=O)(O)O FC(F)F ClC(Cl)Cl BrC(Br)Br FC(F)(F)F ClC(Cl)(Cl)Cl ClCCl FCF BrCBr FCCl BrCCl N#CC#N
NC#N N=C=O N=C=S [N-]=[N+]=N O=C=C=C=O NF OF FN(F)F FOF ClOCl NCl SCl ClSCl FSF O=S(Cl)Cl
O=S(=O)(Cl)Cl O=S(F)F O=S(=O)(F)F P(F)(F)F P(Cl)(Cl)Cl O=P(Cl)(Cl)Cl O=P(F)(F)F S=P(Cl)(Cl)Cl PP
CP CPC CP(C)C C=S C=N C=C=C C=C=O N=N [O-][n+]1ccccc1 [N-]=[N+]=O O=NCl O=[N+]([O-])F
"""

HYDROCARBONS = """
CCC CCCC CC(C)C CCCCC CC(C)(C)C CCCCCC CCCCCCC CCCCCCCC CC(C)CC CC(C)C(C)C C1CC1 C1CCC1 C1CCCC1
C1CCCCC1 C1CCCCCC1 CC=C CC=CC C/C=C/C C/C=C\\C C=CC=C C=CCC CC(=C)C C=C(C)C=C CC(C)=C(C)C
C=CC=CC=C CC#C CC#CC C#CC#C C=CC#C C1=CC1 C1=CCC1 C1=CCCC1 C1=CCCCC1 C1=CC=CC1 C1C=CC=CC1 C=C1CC1
C1CC2CC12 C1CC2CCC12 C12C3C1C23 C1CC2CCC1C2 C1CC2CCC1CC2 C1C2CC3CC1CC(C2)C3 C12CC(C1)C2 c1ccccc1
Cc1ccccc1 Cc1ccccc1C Cc1ccc(C)cc1 CCc1ccccc1 C=Cc1ccccc1 C#Cc1ccccc1 c1ccc2ccccc2c1
c1ccc(-c2ccccc2)cc1 c1ccc2c(c1)CCC2 c1ccc2c(c1)C=CC2 CC(C)c1ccccc1 C1=CC=CC=CC1 CC=C=CC CC1CC1
CC1CCCCC1 C1CCC2(CC1)CC2 C=CC1CC1 CC(C)(C)C#C Cc1cc(C)cc(C)c1 c1ccc(Cc2ccccc2)cc1 C1CC1C1CC1
"""

OXYGEN = """
CCO CCCO CC(C)O CC(C)(C)O CCCCO OCCO OCC(O)CO OC1CC1 OC1CCCCC1 C=CCO C#CCO OCc1ccccc1 Oc1ccccc1
Cc1ccc(O)cc1 Oc1ccccc1O Oc1ccc(O)cc1 COC CCOC CCOCC COCCOC C1CO1 CC1CO1 C1COC1 C1CCOC1 C1CCOCC1
C1COCCO1 C1OCOCO1 C1COCO1 COc1ccccc1 COC=C C=COC=C c1ccoc1 Cc1ccco1 c1ccc2occc2c1 COCOC COC(OC)OC
COO CCOO COOC CC=O CCC=O CC(C)C=O C=CC=O O=CC=O O=Cc1ccccc1 CC(C)=O CCC(C)=O CC(=O)C(C)=O
CC(=O)CC(C)=O CC(=O)C=C CC(=O)c1ccccc1 O=C1CCC1 O=C1CCCC1 O=C1CCCCC1 O=C1C=CCCC1 O=C1C=CC(=O)C=C1
O=c1ccocc1 O=C1CC1 CC=C=O OC=O CC(=O)O CCC(=O)O C=CC(=O)O OC(=O)C(=O)O OC(=O)CC(=O)O
OC(=O)CCC(=O)O OCC(=O)O CC(O)C(=O)O CC(=O)C(=O)O O=C(O)c1ccccc1 O=C(O)c1ccccc1O OC(=O)C=CC(=O)O
COC=O COC(C)=O CCOC(C)=O CC(=O)OC=C CC(=O)Oc1ccccc1 COC(=O)c1ccccc1 COC(=O)C=C O=C1CCCO1 O=C1CCO1
O=C1CCCCO1 O=C1C=CCO1 CC(=O)OC(C)=O O=C1CCC(=O)O1 O=C1OC(=O)c2ccccc12 COC(=O)OC O=C1OCCO1 OC(=O)O
O=c1ccc2ccccc2o1 OCC1OC(O)C(O)C(O)C1O OC1COC(O)C1O CC(=O)OO COC(=O)C(=O)OC OC1CCCO1
c1ccc2c(c1)OCO2 COc1ccc(C=O)cc1O OC=CC=O CC(O)CC=O OC(=O)C#C COc1cccc(OC)c1 C1OC1C=O CC1(C)OC1
OCC=O
"""

NITROGEN = """
CNC CN(C)C CCN CCNCC CCN(CC)CC CC(C)N NCCN NCCO CC(C)(C)N C=CCN NC1CC1 NC1CCCCC1 C1CN1 CN1CC1
C1CNC1 C1CCNC1 C1CCNCC1 CN1CCCCC1 C1CNCCN1 C1COCCN1 CN1CCOCC1 C1CN2CCN1CC2 C1CN2CCC1CC2 Nc1ccccc1
CNc1ccccc1 CN(C)c1ccccc1 NCc1ccccc1 Nc1ccc(N)cc1 CC=N CC=NC CN=C C=NC1CC1 C(=Nc1ccccc1)c1ccccc1
CNN NNC=O CC=NN CC(C)=NN CN=NC c1ccc(N=Nc2ccccc2)cc1 CC=NO CC(C)=NO NOC CON=C CC#N CCC#N C=CC#N
C#CC#N N#CCC#N N#Cc1ccccc1 CC(=O)C#N N#CN(C)C [C-]#[N+]C [C-]#[N+]CC CN=[N+]=[N-] CCN=[N+]=[N-]
c1ccccc1N=[N+]=[N-] [N-]=[N+]=C CN=C=O CCN=C=O O=C=Nc1ccccc1 CN=C=NC C[N+](=O)[O-] CC[N+](=O)[O-]
C=C[N+](=O)[O-] O=[N+]([O-])c1ccccc1 CO[N+](=O)[O-] CON=O CN=O CN(C)N=O CN(C)[N+](=O)[O-]
O=Nc1ccccc1 C[N+](C)(C)[O-] NC=O CC(N)=O CNC=O CNC(C)=O CN(C)C=O CN(C)C(C)=O CCC(=O)N NC(=O)C(N)=O
NC(=O)c1ccccc1 CC(=O)Nc1ccccc1 O=C1CCN1 O=C1CCCN1 O=C1CCCCN1 CN1CCCC1=O O=C1CCC(=O)N1
O=C1NC(=O)c2ccccc12 NC(N)=O CNC(=O)NC CN(C)C(=O)N(C)C O=C1NCCN1 O=C1CC(=O)NC(=O)N1 COC(N)=O
CNC(=O)OC NC(N)=N CN=C(N)N CNC(=N)NC CC(N)=N C1=NCCN1 CC(=O)NO CC(=O)NN NCC(=O)O CC(N)C(=O)O
NCC(N)=O CN(C)CC(=O)O NCCC(=O)O O=C1CNC(=O)CN1 NC=C CN(C)C=C NC=CC=O CN(C)C=CC=O NCC#N c1cc[nH]c1
Cn1cccc1 Cc1ccc[nH]1 c1ccncc1 Cc1ccccn1 Cc1ccncc1 c1cnccn1 c1ccnnc1 c1cncnc1 c1ncncn1 c1cnnnc1
c1c[nH]cn1 Cn1ccnc1 c1cc[nH]n1 Cn1cccn1 c1c[nH]nn1 c1nc[nH]n1 Cn1ccnn1 c1nnn[nH]1 Cn1cnnn1 c1cocn1
c1conc1 c1cnoc1 Cc1cnoc1 c1nnco1 c1ncon1 c1ccc2[nH]ccc2c1 Cn1ccc2ccccc12 c1ccc2[nH]cnc2c1
c1ccc2[nH]ncc2c1 c1ccc2ncccc2c1 c1ccc2cnccc2c1 c1ccc2nccnc2c1 c1ccc2ncncc2c1 c1cnc2ncccc2c1
c1ccc2ocnc2c1 c1ncc2[nH]cnc2n1 Nc1ncnc2[nH]cnc12 Nc1nc2[nH]cnc2c(=O)[nH]1 Nc1cc[nH]c(=O)n1
O=c1cc[nH]c(=O)[nH]1 Cc1c[nH]c(=O)[nH]c1=O Nc1ccccn1 Nc1ccncc1 Oc1ccccn1 O=c1cccc[nH]1 Cn1ccccc1=O
COc1ccccn1 Nc1ncccn1 N#Cc1ccncc1 O=Cc1ccccn1 NC(=O)c1cccnc1 c1ccn2ccnc2c1 c1ccn2cccc2c1
Nc1ccn[nH]1 Nc1nnc[nH]1 c1ccc2[nH]nnc2c1 CC1=NCCO1 C1=CN=CN1C C1CC=NN1 N1C=CCC=C1 CN1C=CC=CC1=O
[O-][n+]1ccccc1C CN1C=NC2=C1C(=O)N(C)C(=O)N2C
"""

SULFUR_PHOSPHORUS = """
CCS CCCS CC(C)S SCCS SCCO CSC CCSC CCSCC CSCSC CSSC CCSSCC CSSSC C1CS1 C1CSC1 C1CCSC1 C1CCSCC1
C1CSCCS1 C1CSSC1 Sc1ccccc1 CSc1ccccc1 C=CSC c1ccsc1 Cc1cccs1 c1ccc2sccc2c1 c1cscn1 c1cnsc1
Cc1cscn1 c1nncs1 c1ncsn1 c1ccc2scnc2c1 Nc1nccs1 CC=S CC(C)=S CC(=S)C NC=S CC(N)=S CN(C)C=S NC(N)=S
CNC(=S)NC CC(=O)S CC(=O)SC CC(=S)OC CSC(=S)SC CN=C=S CSC#N c1ccccc1N=C=S CS(C)=O CCS(C)=O
CS(=O)c1ccccc1 O=S1CCCC1 CS(=O)O CS(C)(=O)=O CCS(C)(=O)=O C=CS(C)(=O)=O O=S1(=O)CCCC1
O=S1(=O)CC=CC1 CS(=O)(=O)c1ccccc1 CS(N)(=O)=O CNS(C)(=O)=O CN(C)S(C)(=O)=O NS(=O)(=O)c1ccccc1
NS(N)(=O)=O CS(=O)(=O)O COS(C)(=O)=O COS(=O)(=O)OC O=S(=O)(O)c1ccccc1 CS(=O)(=O)Cl CS(=O)(=O)F
COS(=O)OC O=S1OCCO1 CS(C)(=N)=O CN=S(C)(C)=O C[S+](C)[CH2-] O=C1NS(=O)(=O)c2ccccc12 O=S1(=O)CCN1
SC#N N#CSC NCCS OC(=O)CS CSCC(N)C(=O)O NC(CS)C(=O)O O=c1cccc[nH]1 S=c1cccc[nH]1 CSO COSC NSC CP
CCP CP(C)c1ccccc1 CP(C)(C)=O O=P(C)(C)O CP(C)(=O)OC CP(=O)(O)O CP(=O)(OC)OC COP(=O)(OC)OC
COP(=O)(O)O COP(=O)(O)OC COP(OC)OC O=P1(OC)OCCO1 CP(C)(C)=S COP(=S)(OC)OC COP(=O)(OC)SC
CNP(=O)(OC)OC NP(N)(N)=O CN(C)P(=O)(N(C)C)N(C)C CP(=O)(F)OC CP(=O)(Cl)Cl O=P(c1ccccc1)(C)C
C=P(C)(C)C CP(C)N COPC OP(O)O O=[PH](OC)OC C1CCPC1 OP(=O)(O)OP(=O)(O)O CC(=O)OP(=O)(O)O
C=C(OP(=O)(O)O)C(=O)O OP(=O)(O)OCC COP(=O)(OC)C=C CP(Cl)Cl CP(F)F FP(F)(F)(F)F c1cc[pH]c1 C#CP(C)C
CSP(C)C CS(=O)CSC C=S(=O)=O CN=S=O
"""

HALOGENS = """
CCF CCCl CCBr CC(F)F CC(F)(F)F CC(Cl)Cl CC(Cl)(Cl)Cl FCCF ClCCCl BrCCBr FC(F)C(F)F
FC(F)(F)C(F)(F)F ClC(F)F ClC(F)(F)F BrC(F)(F)F BrC(Cl)(F)C(F)(F)F CC(C)F CC(C)Cl CC(C)Br
CC(C)(C)Cl CC(C)(C)Br CCCCF CCCCCl CCCBr C=CF C=CCl C=CBr C=C(F)F C=C(Cl)Cl FC(F)=C(F)F
ClC(Cl)=C(Cl)Cl FC=CF Cl/C=C/Cl Cl/C=C\\Cl BrC=CBr C=CCCl C=CCBr C#CF C#CCl C#CBr C#CCCl C#CCBr
Fc1ccccc1 Clc1ccccc1 Brc1ccccc1 Fc1ccccc1F Fc1ccc(F)cc1 Clc1ccc(Cl)cc1 Brc1ccc(Br)cc1
Fc1cc(F)cc(F)c1 Clc1ccccc1Br Fc1c(F)c(F)c(F)c(F)c1F FC(F)(F)c1ccccc1 FCc1ccccc1 ClCc1ccccc1
BrCc1ccccc1 Fc1ccccn1 Clc1ccccn1 Brc1cccnc1 Fc1ccncc1 Clc1ncccn1 Brc1ccco1 Clc1cccs1 Brc1cccs1
Fc1cc[nH]c1 Clc1c[nH]cn1 Brc1cn[nH]c1 OCCF OCCCl OCCBr OCC(F)(F)F OC(C(F)(F)F)C(F)(F)F COCCl
COC(F)F COC(F)(F)F FC(F)(F)OC(F)(F)F NCC(F)(F)F NCCCl CN(C)CCBr O=CCCl O=CC(Cl)(Cl)Cl CC(=O)CF
CC(=O)CCl CC(=O)CBr CC(=O)C(F)(F)F O=C(C(F)(F)F)C(F)(F)F OC(=O)CF OC(=O)CCl OC(=O)CBr OC(=O)C(F)F
OC(=O)C(F)(F)F OC(=O)C(Cl)(Cl)Cl CC(F)=O CC(Cl)=O CC(Br)=O O=CF O=C(F)F O=C(Cl)Cl COC(=O)Cl
CN(C)C(=O)Cl O=C(Cl)c1ccccc1 NC(=O)CF NC(=O)CCl NC(=O)C(F)(F)F COC(=O)CCl COC(=O)C(F)(F)F N#CCF
N#CCCl N#CCBr FC#N ClC#N BrC#N FC(F)(F)S(=O)(=O)O FC(F)(F)S(N)(=O)=O CSC(F)(F)F CSCCl FC(F)(F)SC
ClCS(C)(=O)=O Oc1ccccc1F Oc1ccccc1Cl Oc1ccccc1Br Oc1ccc(F)cc1 Nc1ccc(F)cc1 Nc1ccc(Cl)cc1
Nc1ccccc1Br O=Cc1ccc(F)cc1 O=C(O)c1ccc(Cl)cc1 N#Cc1ccc(Br)cc1 COc1ccc(F)cc1 COc1ccccc1Cl FC1CC1
ClC1CC1 BrC1CC1 FC1(F)CC1 FC1CCCCC1 ClC1CCCCC1 BrC1CCCC1 FC1CCNC1 FC1(F)CCNCC1 ClCC1CO1 FCC1CO1
CN(F)C CN(C)Cl CNBr COF COCl COBr CSCl CSBr
"""

MORE_FUNCTIONS = """
OCC#CCO CC(C)(O)C#N CC(O)C#N NCC=O COCC#N CC(=O)CC#N N#CC=CC#N OC(=O)CC#N O=CNC=O CC(=O)NC(C)=O
CC(=O)N(C)OC CON(C)C(C)=O NC(=O)CO NC(=O)CN CC(=O)NCC(N)=O CNC(=O)CNC(C)=O CC(=O)NCCO OCC(N)C(=O)O
OC(=O)C1CCCN1 O=CC(O)CO OCC(=O)CO O=C(O)C(O)C(O)C(=O)O OC(=O)CC(O)(CC(=O)O)C(=O)O
NC(=O)CCC(N)C(=O)O CC1=CC(=O)CC1 O=C1C=CC=CC1=O CC(=O)C=CC C1=COC=CC1 C1=COCCO1 C1=CSC=CC1
C1=CSCCC1 N1C=CN=CC1 C1=CC=NC=C1C=C O=C1C=CNC=C1 S=C1NCCN1 O=C1NCCO1 O=C1NCCS1 O=C1NC(=O)CS1
S=C1SCC(=O)N1 O=C1NC(=O)CN1 CN1C(=O)CNC1=O O=C1OCCN1C C1CC2OC2C1 C1CC2NC2C1 C1OC2CC1C2 C1CC2CC1NC2
C1CC2OCC1O2 C1NC2CC1C2 C1COC2(C1)CC2 C1CC2(C1)CNC2 C1CC2(CN1)COC2 C1C2CNCC12 CC1(C)CC1 C=C1CCC1
C1=CC2CCC1C2 C1=CC2CC1C=C2 C#CC1CC1 N#CC1CC1 O=CC1CC1 OC(=O)C1CC1 NC(=O)C1CC1 COC1CC1 O=C1CC2CC2C1
c1ccc2c(c1)CC2 c1ccc2c(c1)CO2 c1ccc2c(c1)CN2 c1ccc2c(c1)NCC2 c1ccc2c(c1)OCC2 c1ccc2c(c1)CCO2
c1ccc2c(c1)NCCN2 c1ccc2c(c1)OCCO2 O=C1Cc2ccccc2N1 O=C1CCc2ccccc12 O=c1ccc2ccccc2[nH]1
O=c1[nH]cnc2ccccc12 O=c1cc(-c2ccccc2)oc2ccccc12 c1ccc(-c2ccccn2)cc1 c1ccc(-c2ccc[nH]2)cc1
c1ccc(-c2cccs2)cc1 c1ccc(-c2ccco2)cc1 c1ccc(-c2cn[nH]c2)cc1 c1ccc(Oc2ccccc2)cc1
c1ccc(Nc2ccccc2)cc1 c1ccc(Sc2ccccc2)cc1 O=C(c1ccccc1)c1ccccc1 O=S(=O)(c1ccccc1)c1ccccc1
O=C(Nc1ccccc1)c1ccccc1 c1ccc2c(c1)[nH]c1ccccc12 c1ccc2c(c1)oc1ccccc12 c1ccc2cc3ccccc3cc2c1
C1=Cc2cccc3cccc1c23 c1cnc2[nH]ccc2c1 c1cnc2occc2c1 c1cnc2sccc2c1 c1cc2nccnc2s1 c1cn2ccnc2cn1
c1cc2ccnn2cn1 c1nc2cnccc2[nH]1 n1ccc2nsnc2c1 c1ccc2nonc2c1 c1ccc2nsnc2c1 c1cnon1 c1cnsn1
Cc1nnc(C)o1 Cc1noc(C)n1 Cc1nnc(C)s1 Cc1nc(C)c[nH]1 Cc1cc(C)n[nH]1 CSc1ncccn1 COc1ncccn1
CN(C)c1ncccn1 CN(C)c1ccncc1 CS(=O)(=O)c1ccncc1 O=[N+]([O-])c1cccnc1 O=[N+]([O-])c1ncc[nH]1
O=[N+]([O-])c1ccc[nH]1 O=[N+]([O-])c1ccco1 O=[N+]([O-])c1ccc(O)cc1 Nc1ccc([N+](=O)[O-])cc1
CC(C)[N+](=O)[O-] OCC[N+](=O)[O-] O=[N+]([O-])C[N+](=O)[O-] CCO[N+](=O)[O-] CC(=O)ON CC(=O)ON=C
CN(C)O CN(O)C=O CC(C)=NOC CC=NNC(N)=O NC(=N)c1ccccc1 NC(=N)N(C)C CC(=N)OC N=C(N)NC#N CN=C(C)N(C)C
C1CN=C2CCCN2C1 NNc1ccccc1 CN(C)N CNNC C1CNN1 C1CCNNC1 N1=NC1 CC1(C)N=N1 CC(=[N+]=[N-])C
[N-]=[N+]=CC(=O)OC O=C(C)N=[N+]=[N-] CS(=O)(=O)N=[N+]=[N-] C=CN=[N+]=[N-] CON=NC CN=[N+]([O-])C
C[N+]([O-])=CC C=[N+]([O-])C CC#[N+][O-] c1ccccc1C#[N+][O-] CCC#N CC(C)C#N CC(C)(C)C#N N#CCCC#N
N#CCO N#CCOC N#CCS N#CCN(C)C OC(=O)C=O COC(=O)C=O COC(=O)CO CC(C)OC(C)=O CC(=O)OC(C)(C)C
CCOC(=O)CC(=O)OCC O=C(OCC)C#N COC(=O)CN COC(=O)C#C CCCC(=O)O CC(C)C(=O)O CC(C)(C)C(=O)O
"""

UNUSUAL = """
P#P [C-]#[S+] C1C2CC12 CCCCl [O-][O+]=O FC(F)(F)C#N FS(F)(F)(F)(F)F N=O C#P C=P FN=NF
"""

RADICALS = """
[CH3] [CH2] [CH] [NH2] [NH] [OH] [SH] [PH2] [PH] C[CH2] C[O] C[S] C[NH] [C]#N [CH]=O C=[CH] C#[C]
[N]=O [O]N=O [O]Cl [O]O O=O S=S O=S O[CH2] C[CH]C C[C](C)C C[C]=O F[CH2] Cl[CH2] Br[CH2] F[C](F)F
Cl[C](Cl)Cl F[C]F Cl[C]Cl F[P]F [O]Br [O]F [S]Cl N[NH] C[PH] O[PH] O=[P] [c]1ccccc1 [CH2]C=C
"""

DRUG_LIKE = """
CC(=O)Oc1ccccc1C(=O)O CC(=O)Nc1ccc(O)cc1 CC(C)Cc1ccc(cc1)C(C)C(=O)O Cn1cnc2c1c(=O)n(C)c(=O)n2C
CN1CCCC1c1cccnc1 CNCC(O)c1ccc(O)c(O)c1 NCCc1c[nH]c2ccc(O)cc12 NCCc1ccc(O)c(O)c1 CC(N)Cc1ccccc1
CCN(CC)CC(=O)Nc1c(C)cccc1C CCN(CC)CCOC(=O)c1ccc(N)cc1 Nc1ccc(S(N)(=O)=O)cc1
Cc1cc(NS(=O)(=O)c2ccc(N)cc2)no1 COc1cc(Cc2cnc(N)nc2N)cc(OC)c1OC CC1(C)SC2C(NC(=O)C)C(=O)N2C1C(=O)O
O=C(O)c1cn(C2CC2)c2ccccc2c1=O CC(C)NCC(O)COc1ccccc1 CC(C)NCC(O)COc1cccc2ccccc12
CN(C)CCOC(c1ccccc1)c1ccccc1 CN(C)CCCN1c2ccccc2CCc2ccccc12 Clc1ccc(cc1)C(=O)NCCN1CCOCC1
NC(=O)N1c2ccccc2C=Cc2ccccc12 O=C1NC(=O)C(c2ccccc2)(c2ccccc2)N1 CN1C(=O)CN=C(c2ccccc2)c2cc(Cl)ccc12
CCC1(CC)C(=O)NC(=O)NC1=O CN(C)C(=N)NC(=N)N NC(=O)c1cnccn1 NNC(=O)c1ccncc1
Cc1ncc([N+](=O)[O-])n1CCO OC(Cn1cncn1)(Cn1cncn1)c1ccc(F)cc1F Cc1nccn1CC(=O)Nc1ccc(Cl)cc1
CSCC(=O)Nc1ccccc1Br O=C(O)Cc1ccccc1Nc1c(Cl)cccc1Cl COc1ccc2cc(ccc2c1)C(C)C(=O)O
CC(=O)CC(c1ccccc1)c1ccccc1O CN1CCN(CC1)c1ccc(cc1)C(C)=O O=C(NCc1ccccc1)c1ccco1
CC(C)(C)NCC(O)c1ccc(O)c(CO)c1 Oc1ccc(cc1)C1CC(=O)c2ccc(O)cc2O1 OC(=O)C=Cc1ccc(O)c(O)c1
COc1cc(CC=C)ccc1O CC(C)C1CCC(C)CC1O CC1=CCC(CC1)C(C)=C CC1(C)C2CCC1(C)C(=O)C2 CC(=CCCC(C)=CCO)C
OCC1OC(Oc2ccccc2)C(O)C(O)C1O Nc1ccn(C2CC(O)C(CO)O2)c(=O)n1 Cc1cn(C2CC(O)C(CO)O2)c(=O)[nH]c1=O
Nc1ncnc2c1ncn2C1OC(CO)C(O)C1O OCC(O)C1OC(=O)C(O)=C1O CC(O)(CC(=O)O)CCO
CCOP(=S)(OCC)Oc1ccc(cc1)[N+](=O)[O-] COP(=O)(OC)OC=C(Cl)Cl CSCCC(NC=O)C(=O)OC
NC(CCP(C)(=O)O)C(=O)O OP(=O)(O)CNCC(=O)O CCOP(=O)(OCC)Cc1ccccc1 OC(=O)COc1ccc(Cl)cc1Cl
CCNc1nc(Cl)nc(NC(C)C)n1 CN(C)C(=O)Nc1ccc(Cl)cc1 CCOC(=O)c1ccc(Br)cc1 O=C(Nc1ccc(Br)cc1)N1CCCC1
Brc1ccc2[nH]ccc2c1 FC(F)(F)c1cccc(NC(=O)c2ccncc2)c1 CNCCC(Oc1ccc(cc1)C(F)(F)F)c1ccccc1
CC(C)(C#N)c1ccccc1CNC(=O)C CCS(=O)(=O)c1ccc(CC(N)=O)cc1 Cc1ccc(cc1)S(=O)(=O)NC(=O)NC1CCCCC1
NS(=O)(=O)c1cc2c(cc1Cl)NCNS2(=O)=O CC(C)c1nc(CSC)cs1 CN1CCC(CC1)C(=O)NC1CC1
CC(C)CC(NC(C)=O)C(=O)OC CC(C)OC(=O)C(C)NC(=O)OC(C)(C)C CCCCCCCCCC CCCCCCCCCCO CCCCCCCC(=O)O
CCCCC=CCC(=O)OC CCOCCOCCOCC COCCOCCOCCOC CCCCCCBr CN(C)CCN(C)CCN(C)C CC(C)CCCC(C)CC C1CCC2CCCCC2C1
CC12CCCCC1CCC2=O
"""

CHARGED = """
C[NH3+] [NH4+] [OH3+] C[N+](C)(C)C CC[NH3+] C[NH2+]C C[NH+](C)C NC(N)=[NH2+] CNC(N)=[NH2+]
CC(N)=[NH2+] c1cc[nH+]cc1 c1c[nH]c[nH+]1 C1CC[NH2+]CC1 C1COCC[NH2+]1 [NH3+]c1ccccc1 C[OH2+]
CC=[OH+] C[S+](C)C C[P+](C)(C)C [NH3+]CC(=O)O C[n+]1ccccc1 [OH-] [F-].O [Cl-].O [Br-].O [O-]C=O
CC(=O)[O-] CCC(=O)[O-] [O-]C(=O)c1ccccc1 C[O-] CC[O-] [O-]c1ccccc1 C[S-] [S-]c1ccccc1 [C-]#N
[N-]=[N+]=[N-] [O-][N+](=O)[O-] [O-]N=O CS(=O)(=O)[O-] [O-]S(=O)(=O)O OP(=O)(O)[O-]
COP(=O)([O-])OC NCC(=O)[O-] C[N-]S(C)(=O)=O [O-]C(=O)C(F)(F)F N#C[S-] N#C[O-] O=C1[N-]C(=O)CC1
c1nnn[n-]1 [O-]Cl C[NH3+].O CC(=O)[O-].O [NH4+].O [OH3+].O [OH-].O NC(N)=[NH2+].O
"""

SALT_BRIDGES = """
CC(=O)[O-].C[NH3+] CC(=O)[O-].NC(N)=[NH2+] [O-]C=O.[NH4+] COP(=O)([O-])OC.C[NH3+]
CC(=O)[O-].c1c[nH]c[nH+]1 CC(=O)[O-].[NH4+] [Cl-].[NH4+] CS(=O)(=O)[O-].C[NH3+]
[O-]C=O.C[N+](C)(C)C
"""

CORES = """
c1ccc({})cc1{} c1cc({})cc({})c1 c1cnc({})c({})c1 n1cc({})ccc1{} c1nc({})cc({})n1 c1c({})n(C)nc1{}
c1sc({})nc1{} c1oc({})cc1{} c1c({})[nH]cc1{} c1ccc2c(c1)c({})cn2{} c1cc2[nH]c({})nc2cc1{}
n1c({})nc2ccccc2c1{} c1cc2c(cc1{})OC({})O2 C1CC({})CCN1C{} C1CN(C{})CCN1C{} C1CC({})CC1{}
C1CCC({})(C{})CC1 C1OCC({})N1C{} C1CC1({})C{} O=C(C{})NC{} O=C(C{})OC{} O=C(NC{})NC{}
O=S(=O)(C{})NC{} C(C{})C(O)C{} C(C{})(C)NC{} C(C{})SC{} C(C{})OC{} C=C({})C{} C(C{})#CC{}
CC({})=CC{} c1c({})onc1{} c1nnc({})n1C{} O=C1NC(=O)C({})=CN1C{} O=C1CC({})CN1C{}
c1ccc(C(=O)C{})cc1{} c1ccc(OC{})cc1{} c1ccc(NC(=O)C{})cc1{} c1ccc(S(=O)(=O)NC{})cc1{}
CP(=O)(OC{})OC{} C1OC1({})C{} C(C{})(C#N)C{} CN(C{})C(=O)C{} c1csc({})c1{} c1ccc2nc({})sc2c1{}
O=c1ccc({})cn1C{} N1(C{})CC({})C1 C1C2CC(C1{})CC2{} c1nc({})nc({})n1
"""

SUBSTITUENTS = """
C CC C(C)C C(C)(C)C C=C C#C C1CC1 c1ccccc1 c1ccncc1 c1cccs1 c1ccco1 c1c[nH]cn1 O OC OCC N NC N(C)C
N1CCOCC1 N1CCCC1 F Cl Br C(F)F C(F)(F)F OC(F)(F)F OC(F)F C#N CC#N C=O C(C)=O C(=O)O C(=O)OC C(=O)N
C(=O)NC C(=O)N(C)C NC(C)=O NC=O NC(=O)N NC(=O)OC CO COC CN CN(C)C CCl CBr CF S SC SCC S(C)=O
S(C)(=O)=O S(N)(=O)=O S(=O)(=O)N(C)C NS(C)(=O)=O [N+](=O)[O-] N=[N+]=[N-] P(C)C P(C)(C)=O
P(=O)(OC)OC OP(=O)(OC)OC C(=O)Cl C(N)=N C=NO C=NC C1CO1 C(=S)N C(C)=NN N=C=O N=C=S SC(F)(F)F
C(=O)C=C OC(C)=O OCC#C
"""

# one-letter code -> residue; `{}` is the rest of the chain towards the C terminus
RESIDUES = {
    "G": "NCC(=O){}",
    "A": "N[C@@H](C)C(=O){}",
    "V": "N[C@@H](C(C)C)C(=O){}",
    "L": "N[C@@H](CC(C)C)C(=O){}",
    "I": "N[C@@H]([C@@H](C)CC)C(=O){}",
    "P": "N1CCC[C@H]1C(=O){}",
    "F": "N[C@@H](Cc1ccccc1)C(=O){}",
    "Y": "N[C@@H](Cc1ccc(O)cc1)C(=O){}",
    "W": "N[C@@H](Cc1c[nH]c2ccccc12)C(=O){}",
    "S": "N[C@@H](CO)C(=O){}",
    "T": "N[C@@H]([C@H](O)C)C(=O){}",
    "C": "N[C@@H](CS)C(=O){}",
    "M": "N[C@@H](CCSC)C(=O){}",
    "N": "N[C@@H](CC(N)=O)C(=O){}",
    "Q": "N[C@@H](CCC(N)=O)C(=O){}",
    "D": "N[C@@H](CC(=O)O)C(=O){}",
    "E": "N[C@@H](CCC(=O)O)C(=O){}",
    "H": "N[C@@H](Cc1c[nH]cn1)C(=O){}",
    "K": "N[C@@H](CCCCN)C(=O){}",
    "R": "N[C@@H](CCCNC(=N)N)C(=O){}",
}


def small_organics() -> list[str]:
    """SMILES of the hand-written small molecules, in a fixed order and without repeats."""
    lists = (
        DIATOMICS_AND_SMALL,
        HYDROCARBONS,
        OXYGEN,
        NITROGEN,
        SULFUR_PHOSPHORUS,
        HALOGENS,
        MORE_FUNCTIONS,
    )
    return list(dict.fromkeys(itertools.chain.from_iterable(text.split() for text in lists)))


def unusual() -> list[str]:
    """SMILES of small molecules that no functional group of `small_organics` stands for."""
    return UNUSUAL.split()


def radicals() -> list[str]:
    """SMILES of what is left of small molecules when bonds break; some have no singlet state."""
    return RADICALS.split()


def drug_like() -> list[str]:
    """SMILES of the hand-written larger molecules (drugs, natural products, chains)."""
    return DRUG_LIKE.split()


def ions() -> list[str]:
    """SMILES of charged molecules, some with one water; a neutral-only filter removes them."""
    return CHARGED.split()


def salt_bridges() -> list[str]:
    """SMILES of ion pairs that are neutral as a whole."""
    return SALT_BRIDGES.split()


def decorated(count: int, rng: np.random.Generator) -> list[str]:
    """Draw molecules made of a core and two substituents.

    Args:
        count: number of SMILES, without repeats among themselves.
        rng: source of the draws.

    Returns:
        SMILES strings, each formally valid but not yet parsed.
    """
    cores, substituents = CORES.split(), SUBSTITUENTS.split()
    drawn: dict[str, None] = {}
    while len(drawn) < min(count, len(cores) * len(substituents) ** 2 // 2):
        first, second = rng.integers(len(substituents), size=2)
        core = cores[rng.integers(len(cores))]
        drawn[_fill(core, substituents[first], substituents[second])] = None
    return list(drawn)


def capped_peptide(sequence: str) -> str:
    """SMILES of Ace-X-...-NMe with neutral side chains, for one-letter residue codes."""
    chain = "NC"
    for letter in reversed(sequence):
        chain = RESIDUES[letter].format(chain)
    return "CC(=O)" + chain


def _fill(core: str, first: str, second: str) -> str:
    # ring-closure digits of the substituents must not meet those of the core that are open
    renumber = str.maketrans("12", "78"), str.maketrans("12", "56")
    filled = core
    for substituent, table in zip((first, second), renumber, strict=True):
        filled = filled.replace("{}", substituent.translate(table), 1)
    return filled
